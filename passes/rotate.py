"""Rotates a decoder so that no channel stands out where its linear layers quantize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import PassResult

from qavp_export.numerics.rotation import Rotation, block_rotation, head_rotation, residual_rotation
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._infra import Refusal, RewritePass, RewriteResult, find_value, require_opset
from qavp_export.passes._linear import graph_of, input_of, is_linear, matrix_shape, name_of
from qavp_export.passes._parallel import cut_rows, run_blocks
from qavp_export.passes._residual import ResidualStream, find_residual_stream
from qavp_export.passes._values import ValuePath, find_value_path

# The first with RMSNormalization.
MINIMUM_OPSET = 23
# Elements that are rotated at a time: the float64 temporaries stay in a core's cache.
_CHUNK = 1 << 17

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerRotation:
    """What was folded into one linear layer: `W' = inputs^T diag(gain) W outputs`.

    Attributes:
        inputs: Rotations of the layer's input, in order.
        output: Rotation of its output; None if it is not rotated.
        gain: The initializer of the norm's gain that went into the weight; None if none did.
    """

    inputs: tuple[Rotation, ...] = ()
    output: Rotation | None = None
    gain: ir.Value | None = None


@dataclass
class RotateResult(RewriteResult):
    """What a rotation did.

    Attributes:
        layers: What was folded into each linear layer, by node name.
    """

    layers: dict[str, LayerRotation] = field(default_factory=dict)


class Rotate(RewritePass):
    """Rotates a decoder; its outputs are what they were, to float rounding.

    1. R1: the residual stream is rotated where it begins, behind `at`, so that text and vision tokens, which arrive in
       their own basis, share one rotation. Norm gains move into the linear layers behind the norms; these undo the
       rotation, and the layers that add to the stream apply it.
    2. R2: attention values are rotated per head: folded into the layer that makes them (and its bias) and into the one
       that reads the attention's output. Key/value caches hold rotated values.
    3. R4: the inputs of the layers that add to the stream, which no other layer could rotate for them, are rotated at
       run time, one Hadamard block for each quantization group. The attention's output is left as R2 made it if its
       heads are whole groups.

    Without `stream` there is no R1, and R4 is for the inputs of all linear layers: where a norm stands between a layer
    and the stream that it adds to, as in Gemma 2 and 3, no rotation of the stream can be folded into the layer.

    Weights are rotated in float64, lazily: when they are read. What the pass cannot follow fails before anything is
    changed; attention whose values cannot be followed keeps them as they are and is reported.

    Args:
        group_size: Channels that share a scale (G).
        at: Name of the embeddings.
        seed: Seed of the random signs.
        stream: Rotate the residual stream.

    Raises:
        GraphError: When called: the stream is to be rotated and the decoder has another structure; the message names
            the node.
        RecipeError: When called: `group_size` does not divide the inputs that are rotated at run time.
    """

    def __init__(self, group_size: int, at: str = "inputs_embeds", seed: int = 0, stream: bool = True) -> None:
        super().__init__()
        self.stream = stream
        self.group_size = group_size
        self.at = at
        self.seed = seed

    def requires(self, model: ir.Model) -> None:
        """Checks the opset.

        Raises:
            GraphError: It is older than the first with RMSNormalization.
        """
        require_opset(model, MINIMUM_OPSET)

    def __call__(self, model_or_result: ir.Model | PassResult, /) -> RotateResult:
        """Run the pass; see `RewritePass`."""
        return cast(RotateResult, super().__call__(model_or_result))

    def call(self, model: ir.Model) -> RotateResult:
        """Rotates the main graph."""
        graph = model.graph
        start = find_value(model, self.at)
        stream = find_residual_stream(graph, start) if self.stream else None
        paths, refused = _value_paths(graph)
        # Values that R2 rotates are spread over their head already: a block inside it would add nothing.
        spread = {path.reader for path in paths if path.head_dim % self.group_size == 0}
        unrotated = [writer.node for writer in stream.writers] if stream is not None else _own_linears(graph)
        blocks = {
            node: block_rotation(matrix_shape(input_of(node, 1))[0], self.group_size)
            for node in unrotated
            if node not in spread
        }
        linears = stream.linears() if stream is not None else blocks
        folds = {node: _Fold() for node in (*linears, *(node for x in paths for node in (x.maker, x.reader)))}
        shared: dict[int, ir.Value] = {}
        if stream is not None:
            self._rotate_stream(graph, stream, folds, shared)
        for path in paths:
            _rotate_values(path, folds, self.seed)
        for node, rotation in blocks.items():
            folds[node].inputs.append(rotation)
        _rotate_inputs(graph, blocks, shared)
        for node, fold in folds.items():
            _transform(input_of(node, 1), fold.on_weight)
        layers = {str(node.name): fold.frozen() for node, fold in folds.items()}
        return RotateResult(model, modified=True, matched=len(folds), refused=refused, layers=layers)

    def _rotate_stream(
        self, graph: ir.Graph, stream: ResidualStream, folds: dict[ir.Node, _Fold], shared: dict[int, ir.Value]
    ) -> None:
        width = stream.start.shape[-1] if stream.start.shape is not None else None
        if not isinstance(width, int):
            raise TypeError(f"{stream.start.name} has no static width")
        rotation = residual_rotation(width, self.seed)
        ones = _initializer(graph, f"{self.at}.rotation.gain", np.ones(width, np.float32))
        for norm in stream.norms:
            gain = input_of(norm.node, 1)
            for reader in norm.readers:
                folds[reader].gain = gain
                folds[reader].inputs.append(rotation)
            norm.node.replace_input_with(1, ones)
        for gain in {fold.gain for fold in folds.values() if fold.gain is not None}:
            if not gain.uses():
                graph.initializers.pop(str(gain.name))
        for writer in stream.writers:
            folds[writer.node].output = rotation
            if writer.bias is not None:
                _transform(writer.bias, lambda bias: rotation.apply(bias).astype(np.float32))
        builder = NodeBuilder(f"/{self.at}/rotation")
        rotated = _nodes(builder, graph, stream.start, rotation, shared)
        graph.insert_before(stream.consumers[0], builder.nodes)
        for node in stream.consumers:
            for index, value in enumerate(node.inputs):
                if value is stream.start:
                    node.replace_input_with(index, rotated)


@dataclass
class _Fold:
    """Collects what is folded into one linear layer."""

    inputs: list[Rotation] = field(default_factory=list)
    output: Rotation | None = None
    gain: ir.Value | None = None

    def frozen(self) -> LayerRotation:
        return LayerRotation(tuple(self.inputs), self.output, self.gain)

    def on_weight(self, weight: Array) -> Array:
        """Folds into `[K,N]`; blocks of rows or columns at a time, so that float64 costs little memory."""
        folded = np.empty_like(weight)
        if self.inputs or self.gain is not None:
            gain = None if self.gain is None or self.gain.const_value is None else self.gain.const_value.numpy()
            run_blocks(partial(self._fold_inputs, weight, folded, gain), cut_rows(weight.T.shape, _CHUNK))
            weight = folded
        if self.output is not None:
            run_blocks(partial(self._fold_output, self.output, weight, folded), cut_rows(weight.shape, _CHUNK))
        return folded if self.inputs or self.gain is not None or self.output is not None else weight

    def _fold_inputs(self, weight: Array, folded: Array, gain: Array | None, part: slice) -> None:
        vectors = weight[:, part].T.astype(np.float64)
        if gain is not None:
            vectors *= gain
        for rotation in self.inputs:
            vectors = rotation.apply(vectors)
        folded[:, part] = vectors.T

    def _fold_output(self, output: Rotation, weight: Array, folded: Array, part: slice) -> None:
        folded[part] = output.apply(weight[part])


def _value_paths(graph: ir.Graph) -> tuple[list[ValuePath], list[Refusal]]:
    paths, refused = [], []
    for node in graph:
        if node.op_type == "Attention":
            found = find_value_path(node)
            if isinstance(found, ValuePath):
                paths.append(found)
            else:
                refused.append(Refusal(str(node.name), found))
    return paths, refused


def _own_linears(graph: ir.Graph) -> list[ir.Node]:
    """Returns the linear layers whose inputs and weights can be rotated, in graph order."""
    return [
        node
        for node in graph
        if node.op_type == "MatMul"
        and is_linear(node)
        and len(input_of(node, 1).uses()) == 1
        and input_of(node, 1).dtype == ir.DataType.FLOAT
        and input_of(node, 0).shape is not None
    ]


def _rotate_values(path: ValuePath, folds: dict[ir.Node, _Fold], seed: int) -> None:
    made = head_rotation(path.value_heads, path.head_dim, seed)
    folds[path.maker].output = made
    if path.bias is not None:
        _transform(path.bias, lambda bias: made.apply(bias).astype(np.float32))
    folds[path.reader].inputs.append(head_rotation(path.heads, path.head_dim, seed))


def _rotate_inputs(graph: ir.Graph, rotations: Mapping[ir.Node, Rotation], shared: dict[int, ir.Value]) -> None:
    """Rotates inputs at run time; layers that read the same value share what comes of it."""
    done: dict[ir.Value, ir.Value] = {}
    for node, rotation in rotations.items():
        x = input_of(node, 0)
        if x not in done:
            builder = NodeBuilder(f"{name_of(node)}/rotation")
            done[x] = _nodes(builder, graph, x, rotation, shared)
            graph_of(node).insert_before(node, builder.nodes)
        node.replace_input_with(0, done[x])


def _nodes(
    builder: NodeBuilder, graph: ir.Graph, x: ir.Value, rotation: Rotation, shared: dict[int, ir.Value]
) -> ir.Value:
    """Builds what rotates `x [..., width]` at run time; blocks of one size share their matrix."""
    if x.shape is None:
        raise TypeError(f"{x.name} has no shape")
    float32, shape, block = ir.DataType.FLOAT, tuple(x.shape), len(rotation.right)
    leading, rows = shape[:-1], rotation.width // block
    if block not in shared:
        # A constant, not an initializer: it is no weight of a layer.
        matrix = NodeBuilder("/rotation")
        shared[block] = matrix.constant(f"{block}x{block}", rotation.right.astype(np.float32))
        graph.insert_before(graph[0], matrix.nodes)
    right = shared[block]
    if rotation.signs is not None:
        signs = builder.constant("signs", rotation.signs.astype(np.float32))
        x = builder.op("Mul", "Mul", [x, signs], float32, shape)
    # A 0 in Reshape's target copies that axis.
    copied = [0] * len(leading)
    grid = builder.op(
        "Reshape", "Reshape", [x, builder.ints("grid", [*copied, rows, block])], float32, (*leading, rows, block)
    )
    grid = builder.op("MatMul", "MatMul", [grid, right], float32, (*leading, rows, block))
    if rotation.left is not None:
        left = builder.constant("left", np.ascontiguousarray(rotation.left.T).astype(np.float32))
        grid = builder.op("MatMul_1", "MatMul", [left, grid], float32, (*leading, rows, block))
    target = builder.ints("flat", [*copied, rotation.width])
    return builder.op("Reshape_1", "Reshape", [grid, target], float32, shape)


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _transform(value: ir.Value, function: Callable[[Array], Array]) -> None:
    """Replaces an initializer's tensor by a lazy one that applies `function` when it is read."""
    tensor = value.const_value
    if tensor is None:
        raise TypeError(f"initializer {value.name} has no tensor")
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(function(tensor.numpy()), name=value.name),
        dtype=tensor.dtype,
        shape=tensor.shape,  # type: ignore[arg-type]  # an initializer's shape is static
        name=value.name,
    )
