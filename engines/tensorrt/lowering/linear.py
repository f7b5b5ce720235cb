"""Lowers two-level W4A4 linear layers to functions that run as integer kernels; others stay quantizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.engines.kernels.packing import GROUP_SIZES, pack_weight
from qavp_export.engines.lowering.activation import Activation
from qavp_export.engines.lowering.linear import QuantizedLinear, quantized_linears
from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.tensorrt.functions import (
    PLUGIN_ATTRIBUTES,
    QUANTIZE_TWO_LEVEL,
    W4A4_MATMUL,
    quantize_two_level_function,
    w4a4_matmul_function,
)
from qavp_export.numerics.rotation import orthogonal
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._infra import Refusal
from qavp_export.passes._linear import ReadByAll, input_of, name_of
from qavp_export.passes.functions import DOMAIN, add_function

_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8
_PAIR_OPS = frozenset({"TwoLevelScale", "QuantizeLinear"})
_Packed = tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]


@dataclass(frozen=True)
class LoweredLinears:
    """What the lowering did with the quantized linear layers of a graph.

    Attributes:
        precision: What each layer is to run in, by the name of its canonical node: `w4a4`, `w4a8`, ...
        matched: Names of the layers that run as integer kernels.
        refused: Layers with 4-bit activations that stay quantizers and dequantizers, with the reason.
    """

    precision: dict[str, str] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def lower_linears(model: ir.Model) -> LoweredLinears:
    """Rewrites the two-level W4A4 linear layers of a graph to `QuantizeTwoLevel` and `W4A4MatMul`.

    1. Layers that quantize the same value share one `QuantizeTwoLevel`. Where that value is what `passes.rotate` makes
       of another at run time and nothing else reads it, the rotation moves into the quantizer.
    2. Weights are packed anew, lazily: one at a time, when the model is saved.
    3. A bias stays the Add that it was. All other layers keep their quantizers: TensorRT has its own kernels for them.

    Run it before `fold_scales` and behind what looks for quantizers in the canonical form, such as `gather_rows`.

    Args:
        model: A canonical graph; it is changed, and what is no longer used stays in it.

    Returns:
        What became of each layer.
    """
    result = LoweredLinears()
    quantizers = _Quantizers(model)
    for layer in list(quantized_linears(model.graph)):
        name = name_of(layer.node)
        bits = 4 if layer.codes.dtype == ir.DataType.INT4 else 8
        of_input = 32 if layer.activation is None else layer.activation.bits
        result.precision[name] = f"w{bits}a{of_input}"
        if (bits, of_input) != (4, 4):
            continue
        reason = _why_not(layer) or quantizers.why_not(layer.block)
        if reason is None:
            _lower(model, layer, quantizers)
            result.matched.append(name)
        else:
            result.refused.append(Refusal(name, reason))
    return result


def _why_not(layer: QuantizedLinear) -> str | None:
    """Returns why a W4A4 layer cannot run as an integer kernel, or None."""
    activation = layer.activation
    if activation is None or not activation.two_level or "multipliers" not in layer.scales:
        return "its group scales are floats; integer kernels take two-level scales"
    if activation.group_size != layer.block:
        return f"its weight has groups of {layer.block} channels and its input of {activation.group_size}"
    if layer.block not in GROUP_SIZES:
        return f"the kernels take groups of {', '.join(map(str, GROUP_SIZES))} channels, not of {layer.block}"
    return None


class _Quantizers:
    """Builds the quantizers of one model; layers that quantize the same value share one."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._made: dict[Activation, tuple[ir.Value, ir.Value]] = {}
        self._group_size: int | None = None

    def why_not(self, group_size: int) -> str | None:
        """Returns why values cannot be quantized in groups of a size, or None."""
        if self._group_size in (None, group_size):
            return None
        # The function's body holds the rotation of one size.
        return f"it has groups of {group_size} channels, the graph's first W4A4 layer of {self._group_size}"

    def of(self, activation: Activation, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Returns codes times multipliers `[...,K]` INT8 and a step for each token `[...,1]`."""
        if activation not in self._made:
            self._group_size = activation.group_size
            opset = self._model.graph.opset_imports[""]
            add_function(self._model, quantize_two_level_function(opset, activation.group_size))
            self._made[activation] = self._build(activation, before)
        return self._made[activation]

    def _build(self, activation: Activation, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        before_rotation = _unrotated(activation)
        x = activation.x if before_rotation is None else before_rotation
        shape = tuple(activation.x.shape or ())
        attributes = {"group_size": activation.group_size, "rotate": int(x is not activation.x), **PLUGIN_ATTRIBUTES}
        builder = NodeBuilder(activation.name)
        products = builder.op(
            QUANTIZE_TWO_LEVEL, QUANTIZE_TWO_LEVEL, [x], _INT8, shape, attributes, domain=DOMAIN, outputs=2
        )
        steps = builder.nodes[-1].outputs[1]
        steps.dtype, steps.shape = _FLOAT, ir.Shape((*shape[:-1], 1))
        self._model.graph.insert_before(before, builder.nodes)
        return products, steps


def _lower(model: ir.Model, layer: QuantizedLinear, quantizers: _Quantizers) -> None:
    if layer.activation is None:
        raise TypeError(f"{layer.node.name} has a float input")
    products, steps = quantizers.of(layer.activation, layer.node)
    add_function(model, w4a4_matmul_function(model.graph.opset_imports[""]))
    weight, multipliers = _packed_weight(model.graph, layer)
    builder = NodeBuilder(name_of(layer.node))
    result = builder.op(
        W4A4_MATMUL,
        W4A4_MATMUL,
        [products, steps, weight, multipliers, layer.scales["steps"]],
        _FLOAT,
        tuple(layer.node.outputs[0].shape or ()),
        {"group_size": layer.block, **PLUGIN_ATTRIBUTES},
        domain=DOMAIN,
    )
    model.graph.insert_before(layer.node, builder.nodes)
    replace_value(layer.node.outputs[0], result)


def _unrotated(activation: Activation) -> ir.Value | None:
    """Returns what is rotated to make an activation, if nothing but its quantizer reads the result; else None."""
    x, size = activation.x, activation.group_size
    if x.is_graph_output() or any(node.op_type not in _PAIR_OPS for node in x.consumers()):
        return None
    flat = x.producer()
    product = _read(flat, "Reshape")
    grid = _read(product, "MatMul")
    if product is None or grid is None or grid.op_type != "Reshape" or input_of(grid, 0).shape is None:
        return None
    if any(len(node.outputs[0].uses()) != 1 for node in (grid, product)):
        return None
    matrix = ir.convenience.get_const_tensor(input_of(product, 1))
    if matrix is None or not np.array_equal(matrix.numpy(), orthogonal(size).astype(np.float32)):
        return None
    return input_of(grid, 0) if input_of(grid, 0).dtype == _FLOAT else None


def _read(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """Returns the node whose value a node of a type reads first."""
    return input_of(node, 0).producer() if node is not None and node.op_type == op_type else None


def _packed_weight(graph: ir.Graph, layer: QuantizedLinear) -> tuple[ir.Value, ir.Value]:
    """Returns initializers: the codes `[N,K/2]`, two a byte, and the multipliers `[N,K/G]`."""
    codes, multipliers = layer.codes, layer.scales["multipliers"]
    names = f"{codes.name}.packed", f"{multipliers.name}.by_output"
    if names[0] not in graph.initializers:
        inputs, outputs = layer.sizes
        packed = ReadByAll(partial(_pack, codes, multipliers, layer.block), readers=2)
        shapes = (outputs, inputs // 2), (outputs, inputs // layer.block)
        for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            graph.register_initializer(_lazy(name, shape, partial(_part, packed, index)))
    return graph.initializers[names[0]], graph.initializers[names[1]]


def _lazy(name: str, shape: tuple[int, int], read: Callable[[], npt.NDArray[np.int8]]) -> ir.Value:
    tensor = ir.LazyTensor(lambda: ir.tensor(read(), name=name), dtype=_INT8, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(_INT8), const_value=tensor)


def _part(packed: ReadByAll[_Packed], index: int) -> npt.NDArray[np.int8]:
    return packed.read()[index]


def _pack(codes: ir.Value, multipliers: ir.Value, group_size: int) -> _Packed:
    return pack_weight(_values(codes), _values(multipliers), group_size)


def _values(value: ir.Value) -> npt.NDArray[np.int8]:
    """Reads 4-bit integers as bytes, and lets go of the file."""
    tensor = value.const_value
    if tensor is None:
        raise TypeError(f"initializer {value.name} has no tensor")
    values = tensor.numpy().astype(np.int8)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return values
