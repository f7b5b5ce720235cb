"""Places QuantizeLinear / DequantizeLinear pairs around linear layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.numerics.one_level import Bits, largest_code
from qavp_export.numerics.two_level import TwoLevel
from qavp_export.passes import group_scale, two_level_scale
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._infra import Refusal, RewritePass, RewriteResult, require_opset
from qavp_export.passes._linear import (
    ReadByAll,
    graph_of,
    input_of,
    is_linear,
    matrix_shape,
    name_of,
    part_tensor,
    weight_part,
    why_not_quantizable,
)
from qavp_export.passes.quantizer import Quantized, RoundWeights, WeightQuantizer
from qavp_export.passes.scheme import W4A4, Scheme

MINIMUM_OPSET = 21
_SCALES: Mapping[str, ir.DataType] = MappingProxyType(
    {"scales": ir.DataType.FLOAT, "multipliers": ir.DataType.UINT4, "steps": ir.DataType.FLOAT}
)


class PlaceQdq(RewritePass):
    """Rewrites `MatMul(x, weight)` with a constant weight `[K,N]` to run in a scheme's precision.

    1. Weights become codes and scales: `DequantizeLinear(codes [K,N], scales [K/B,N], axis=0, block_size=B)`, where the
       block B is the group size, or K for one scale per output channel. In the two-level form the scales are
       `Cast(multipliers UINT4 [K/G,N]) * steps [N]`. All parts are lazy: a weight is read and quantized once, when the
       model is saved.
    2. Activations `x [...,K]` become `DequantizeLinear(QuantizeLinear(x, s), s)` in INT4 or INT8, blocked along the
       last axis, where `s` is `qavp.TwoLevelScale(x)` or `qavp.GroupScale(x) [...,K/B]`. Linear layers that share an
       input and a scheme share the pair.
    3. Zero points are omitted: both are symmetric.

    Works on any opset 21+ model whose linear layers are MatMul nodes; run `FoldWeightTransposes` first if weights
    are stored as `[N,K]`. A MatMul that a scheme names and that cannot be quantized is refused with the reason.

    Args:
        group_size: Channels along K that share a scale (G).
        schemes: Pairs of a glob over node names and a scheme, first match wins; nodes that match none, or match None,
            stay float.
        quantizer: Rounds the weights; to the nearest code with a clip search if it is left out.
    """

    def __init__(
        self,
        group_size: int,
        schemes: Sequence[tuple[str, Scheme | None]] = (("*", W4A4),),
        quantizer: WeightQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.schemes = tuple(schemes)
        self.quantizer = quantizer or RoundWeights()

    def requires(self, model: ir.Model) -> None:
        """Checks the opset.

        Raises:
            GraphError: It is older than the first with INT4 and blocked scales.
        """
        require_opset(model, MINIMUM_OPSET)

    def call(self, model: ir.Model) -> RewriteResult:
        """Quantizes every matching linear layer of the main graph."""
        refused: list[Refusal] = []
        matched = 0
        weights: dict[tuple[ir.Value, Scheme], ir.Value] = {}
        activations: dict[tuple[ir.Value, Scheme], ir.Value] = {}
        for node in list(model.graph):
            scheme = self._scheme(node)
            if scheme is None:
                continue
            reason = why_not_quantizable(node, self.group_size) or _why_not_shared(input_of(node, 1), scheme, weights)
            if reason is not None:
                refused.append(Refusal(str(node.name), reason))
                continue
            self._quantize_weight(node, scheme, weights)
            if scheme.activations is not None:
                self._quantize_activation(model, node, scheme, activations)
            matched += 1
        return RewriteResult(model, modified=matched > 0, matched=matched, refused=refused)

    def _scheme(self, node: ir.Node) -> Scheme | None:
        if not is_linear(node):
            return None
        name = node.name or ""
        return next((scheme for glob, scheme in self.schemes if fnmatch.fnmatchcase(name, glob)), None)

    def _quantize_weight(self, node: ir.Node, scheme: Scheme, shared: dict[tuple[ir.Value, Scheme], ir.Value]) -> None:
        weight = input_of(node, 1)
        if (weight, scheme) not in shared:
            shared[weight, scheme] = self._static_dq(node, weight, scheme)
        node.replace_input_with(1, shared[weight, scheme])
        if not weight.uses():
            graph_of(node).initializers.pop(str(weight.name))

    def _static_dq(self, node: ir.Node, weight: ir.Value, scheme: Scheme) -> ir.Value:
        channels, outputs = matrix_shape(weight)
        block = scheme.weight_group(channels, self.group_size)
        parts = _weight_parts(weight, scheme, block, lambda: self.quantizer(weight, scheme, self.group_size))
        for part in parts.values():
            graph_of(node).register_initializer(part)
        builder = NodeBuilder(f"{name_of(node)}/weight")
        float32, scales = ir.DataType.FLOAT, parts.get("scales")
        if scales is None:
            grid = (channels // block, outputs)
            multipliers = builder.op("Cast", "Cast", [parts["multipliers"]], float32, grid, {"to": int(float32)})
            scales = builder.op("Mul", "Mul", [multipliers, parts["steps"]], float32, grid)
        blocked = {"axis": 0, "block_size": block}
        name = "DequantizeLinear"
        dequantized = builder.op(name, name, [parts["codes"], scales], float32, (channels, outputs), blocked)
        graph_of(node).insert_before(node, builder.nodes)
        return dequantized

    def _quantize_activation(
        self, model: ir.Model, node: ir.Node, scheme: Scheme, shared: dict[tuple[ir.Value, Scheme], ir.Value]
    ) -> None:
        x = input_of(node, 0)
        # What the weight's bits are does not matter to the activation.
        key = (x, Scheme("int4", scheme.activations, scheme.scales))
        if key not in shared:
            shared[key] = self._dynamic_qdq(model, node, scheme, suffix=f"_{len(shared)}" if _seen(x, shared) else "")
        node.replace_input_with(0, shared[key])

    def _dynamic_qdq(self, model: ir.Model, node: ir.Node, scheme: Scheme, suffix: str) -> ir.Value:
        x = input_of(node, 0)
        builder = NodeBuilder(f"{x.name}{suffix}")
        shape, float32 = tuple(x.shape or ()), ir.DataType.FLOAT
        channels, _ = matrix_shape(input_of(node, 1))
        block = scheme.activation_group(channels, self.group_size)
        scale = _scale(model, builder, x, scheme, block)
        dtype = ir.DataType.INT4 if scheme.activations == "int4" else ir.DataType.INT8
        blocked = {"axis": -1, "block_size": block}
        quantize, dequantize = "QuantizeLinear", "DequantizeLinear"
        codes = builder.op(quantize, quantize, [x, scale], dtype, shape, blocked | {"output_dtype": int(dtype)})
        values = builder.op(dequantize, dequantize, [codes, scale], float32, shape, blocked)
        graph_of(node).insert_before(node, builder.nodes)
        return values


def _why_not_shared(weight: ir.Value, scheme: Scheme, shared: dict[tuple[ir.Value, Scheme], ir.Value]) -> str | None:
    # Codes are named after their weight, so there is one set of them.
    taken = any(other is weight and kind != scheme for other, kind in shared)
    return "it shares its weight with a layer of another scheme" if taken else None


def _seen(x: ir.Value, shared: dict[tuple[ir.Value, Scheme], ir.Value]) -> bool:
    return any(value is x for value, _ in shared)


def _scale(model: ir.Model, builder: NodeBuilder, x: ir.Value, scheme: Scheme, block: int) -> ir.Value:
    """Adds the function node that computes the scales of `x [...,K]`, `[...,K/block]`."""
    shape = tuple(x.shape or ())
    attributes: dict[str, int | float] = {"group_size": block}
    opset = model.graph.opset_imports[""]
    if scheme.activations == "int4" and scheme.scales == "two-level":
        function, op_type = two_level_scale.two_level_scale_function(opset), two_level_scale.OP_TYPE
    else:
        function, op_type = group_scale.group_scale_function(opset), group_scale.OP_TYPE
        attributes["largest_code"] = float(largest_code(_bits(scheme.activations)))
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports.setdefault(function.domain, 1)
    channels = shape[-1]
    groups = channels // block if isinstance(channels, int) else channels
    return builder.op(
        op_type, op_type, [x], ir.DataType.FLOAT, (*shape[:-1], groups), attributes, domain=function.domain
    )


def _bits(kind: str | None) -> Bits:
    return 4 if kind == "int4" else 8


def _weight_parts(
    weight: ir.Value, scheme: Scheme, block: int, quantize: Callable[[], Quantized]
) -> dict[str, ir.Value]:
    """Returns the lazy initializers that a weight becomes: codes, and multipliers and steps or scales."""
    channels, outputs = matrix_shape(weight)
    grid = (channels // block, outputs)
    shapes: dict[str, tuple[int, ...]] = {"codes": (channels, outputs), "scales": grid}
    if scheme.weights == "int4" and scheme.scales == "two-level":
        shapes = {"codes": (channels, outputs), "multipliers": grid, "steps": (outputs,)}
    result = ReadByAll(quantize, readers=len(shapes))
    kinds = {**_SCALES, "codes": ir.DataType.INT4 if scheme.weights == "int4" else ir.DataType.INT8}
    return {
        part: weight_part(weight, part, kinds[part], shape, partial(_part, result, part))
        for part, shape in shapes.items()
    }


def _part(result: ReadByAll[Quantized], part: str) -> npt.NDArray[np.generic]:
    return _stored_arrays(result.read())[part]


def _stored_arrays(quantized: Quantized) -> dict[str, npt.NDArray[np.generic]]:
    """Returns codes and scales as the graph has them, input channels first."""
    if isinstance(quantized, TwoLevel):
        return {"codes": quantized.codes.T, "multipliers": quantized.multipliers.T, "steps": quantized.steps}
    return {"codes": quantized.codes.T, "scales": quantized.scales.T}


def stored_tensors(weight: str, quantized: Quantized) -> list[ir.TensorProtocol]:
    """Returns what a 4-bit weight becomes, as tensors named after their initializers.

    Args:
        weight: Name of the weight's initializer.
        quantized: Codes and scales `[N,K]`, by output channel.
    """
    kinds = {**_SCALES, "codes": ir.DataType.INT4}
    return [part_tensor(f"{weight}.{part}", kinds[part], array) for part, array in _stored_arrays(quantized).items()]
