"""Places QuantizeLinear / DequantizeLinear pairs around linear layers, with two-level 4-bit group scales."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qavp_export.numerics.two_level import (
    Grouped8,
    TwoLevel,
    quantize_grouped_8bit,
    quantize_two_level,
)
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._infra import Refusal, RewritePass, RewriteResult, require_opset
from qavp_export.passes._linear import (
    ReadByAll,
    by_output_channel,
    graph_of,
    input_of,
    is_linear,
    matrix_shape,
    weight_part,
    why_not_quantizable,
)
from qavp_export.passes.two_level_scale import DOMAIN, OP_TYPE, two_level_scale_function

MINIMUM_OPSET = 21


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantized.

    Attributes:
        weights: `int4`: two-level 4-bit groups; `int8`: 8-bit groups with a float scale each.
        activations: `int4`: two-level 4-bit groups computed at run time per token; None: float.
    """

    weights: Literal["int4", "int8"]
    activations: Literal["int4"] | None


W4A4 = Scheme(weights="int4", activations="int4")
W8A16 = Scheme(weights="int8", activations=None)


class PlaceQdq(RewritePass):
    """Rewrites `MatMul(x, weight)` with a constant weight `[K,N]` to run in a scheme's precision.

    1. Weights become codes and scales: `DequantizeLinear(codes [K,N], scales [K/G,N], axis=0, block_size=G)`. In the
       two-level form the scales are `Cast(multipliers UINT4 [K/G,N]) * steps [N]`. Codes, multipliers and steps are
       lazy: a weight is read and quantized once, when the model is saved.
    2. Activations `x [...,K]` become `DequantizeLinear(QuantizeLinear(x, s), s)` in INT4, blocked along the last
       axis, where `s = qavp.TwoLevelScale(x) [...,K/G]`. Linear layers that share an input share the pair.
    3. Zero points are omitted: both are symmetric.

    Works on any opset 21+ model whose linear layers are MatMul nodes; run `FoldWeightTransposes` first if weights
    are stored as `[N,K]`. A MatMul that a scheme names and that cannot be quantized is refused with the reason.

    Args:
        group_size: Channels along K that share a scale (G).
        schemes: Pairs of a glob over node names and a scheme, first match wins; nodes that match none stay float.
    """

    def __init__(self, group_size: int, schemes: Sequence[tuple[str, Scheme]] = (("*", W4A4),)) -> None:
        super().__init__()
        self.group_size = group_size
        self.schemes = tuple(schemes)

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
        activations: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            scheme = self._scheme(node)
            if scheme is None:
                continue
            reason = why_not_quantizable(node, self.group_size)
            if reason is not None:
                refused.append(Refusal(str(node.name), reason))
                continue
            self._quantize_weight(node, scheme, weights)
            if scheme.activations is not None:
                self._quantize_activation(model, node, activations)
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
        parts = (_two_level_parts if scheme.weights == "int4" else _int8_parts)(weight, self.group_size)
        for part in parts.values():
            graph_of(node).register_initializer(part)
        builder = NodeBuilder(f"{node.name}/weight")
        shape, float32 = matrix_shape(weight), ir.DataType.FLOAT
        if scheme.weights == "int4":
            grid = (shape[0] // self.group_size, shape[1])
            multipliers = builder.op("Cast", "Cast", [parts["multipliers"]], float32, grid, {"to": int(float32)})
            scales = builder.op("Mul", "Mul", [multipliers, parts["steps"]], float32, grid)
        else:
            scales = parts["scales"]
        blocked = {"axis": 0, "block_size": self.group_size}
        name = "DequantizeLinear"
        dequantized = builder.op(name, name, [parts["codes"], scales], float32, shape, blocked)
        graph_of(node).insert_before(node, builder.nodes)
        return dequantized

    def _quantize_activation(self, model: ir.Model, node: ir.Node, shared: dict[ir.Value, ir.Value]) -> None:
        x = input_of(node, 0)
        if x not in shared:
            function = two_level_scale_function(model.graph.opset_imports[""])
            model.functions.setdefault(function.identifier(), function)
            model.graph.opset_imports.setdefault(DOMAIN, 1)
            shared[x] = self._dynamic_qdq(node, x)
        node.replace_input_with(0, shared[x])

    def _dynamic_qdq(self, node: ir.Node, x: ir.Value) -> ir.Value:
        producer = x.producer()
        builder = NodeBuilder(str(producer.name if producer is not None else x.name))
        shape = tuple(x.shape or ())
        channels, _ = matrix_shape(input_of(node, 1))
        grid = (*shape[:-1], channels // self.group_size)
        size, float32, int4 = {"group_size": self.group_size}, ir.DataType.FLOAT, ir.DataType.INT4
        scale = builder.op(OP_TYPE, OP_TYPE, [x], float32, grid, size, domain=DOMAIN)
        blocked = {"axis": -1, "block_size": self.group_size}
        quantize, dequantize = "QuantizeLinear", "DequantizeLinear"
        codes = builder.op(quantize, quantize, [x, scale], int4, shape, blocked | {"output_dtype": int(int4)})
        values = builder.op(dequantize, dequantize, [codes, scale], float32, shape, blocked)
        graph_of(node).insert_before(node, builder.nodes)
        return values


def _two_level_parts(weight: ir.Value, group_size: int) -> dict[str, ir.Value]:
    channels, outputs = matrix_shape(weight)

    def quantize() -> TwoLevel:
        return quantize_two_level(by_output_channel(weight), group_size)

    result = ReadByAll(quantize, readers=3)
    groups = channels // group_size
    int4, uint4, f32 = ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT
    return {
        "codes": weight_part(weight, "codes", int4, (channels, outputs), lambda: result.read().codes.T),
        "multipliers": weight_part(
            weight, "multipliers", uint4, (groups, outputs), lambda: result.read().multipliers.T
        ),
        "steps": weight_part(weight, "steps", f32, (outputs,), lambda: result.read().steps),
    }


def _int8_parts(weight: ir.Value, group_size: int) -> dict[str, ir.Value]:
    channels, outputs = matrix_shape(weight)

    def quantize() -> Grouped8:
        return quantize_grouped_8bit(by_output_channel(weight), group_size)

    result = ReadByAll(quantize, readers=2)
    shape = (channels // group_size, outputs)
    int8, f32 = ir.DataType.INT8, ir.DataType.FLOAT
    return {
        "codes": weight_part(weight, "codes", int8, (channels, outputs), lambda: result.read().codes.T),
        "scales": weight_part(weight, "scales", f32, shape, lambda: result.read().scales.T),
    }
