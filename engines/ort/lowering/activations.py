"""Quantizes activations at run time, in as few operators as possible, once for each value that is quantized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qavp_export.engines.ort.lowering.capabilities import Capabilities
from qavp_export.passes import group_scale, two_level_scale
from qavp_export.passes._builder import Dim, NodeBuilder

_LARGEST_OF_4_BITS = 7.0
_FLOAT, _UINT8, _INT8 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8


@dataclass(frozen=True)
class Activation:
    """How the canonical graph quantizes a linear layer's input.

    Attributes:
        x: The float value `[...,K]`.
        group_size: Channels that share a scale.
        largest_code: 7 for 4 bits, 127 for 8.
        two_level: Whether the group scales are integer multiples of one step per token.
    """

    x: ir.Value
    group_size: int
    largest_code: float
    two_level: bool

    @property
    def channels(self) -> int:
        """Returns K."""
        width = None if self.x.shape is None else self.x.shape[-1]
        if not isinstance(width, int):
            raise TypeError(f"{self.x.name} has no static width")
        return width

    @property
    def name(self) -> str:
        """Returns a name that no other quantization of the value has."""
        levels = "two_level" if self.two_level else f"{self.largest_code:.0f}"
        return f"{self.x.name}/{levels}_{self.group_size}"

    @property
    def bits(self) -> int:
        """Returns how many bits the codes have."""
        return 4 if self.largest_code == _LARGEST_OF_4_BITS else 8

    @property
    def groups(self) -> int:
        """Returns K over the group size."""
        return self.channels // self.group_size

    @property
    def per_token(self) -> bool:
        """Whether all channels of a token share a scale."""
        return self.group_size == self.channels


def find_activation(value: ir.Value) -> Activation | None:
    """Reads how a value was quantized: `DequantizeLinear(QuantizeLinear(x, s), s)`; None if it was not."""
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
        return None
    quantize = dequantize.inputs[0].producer()
    if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.inputs[1] is None:
        return None
    x, scale = quantize.inputs[0], quantize.inputs[1].producer()
    if x is None or scale is None or scale.op_type not in (two_level_scale.OP_TYPE, group_scale.OP_TYPE):
        return None
    two_level = scale.op_type == two_level_scale.OP_TYPE
    largest = _LARGEST_OF_4_BITS if two_level else scale.attributes["largest_code"].as_float()
    return Activation(x, scale.attributes["group_size"].as_int(), largest, two_level)


@dataclass(frozen=True)
class _Scales:
    """The scales of a value: of each block `[...,K/G]`, of each token `[...,1]`, and what the one is of the other."""

    blocked: ir.Value
    token: ir.Value
    multipliers: ir.Value | None


class ActivationQuantizers:
    """Builds the quantizers of one graph; layers that read the same value share what is built for it.

    Args:
        graph: The graph.
        capabilities: What the provider runs fast.
    """

    def __init__(self, graph: ir.Graph, capabilities: Capabilities) -> None:
        self._graph = graph
        self._capabilities = capabilities
        self._products: dict[Activation, tuple[ir.Value, ir.Value]] = {}

    def products(self, activation: Activation, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Returns codes times multipliers `[...,K]` as integer products take them, and a scale per token `[...,1]`.

        Args:
            activation: Two-level, or one scale per token.
            before: The node that new nodes go in front of.
        """
        if activation not in self._products:
            builder = NodeBuilder(f"{activation.name}/products")
            of_scales = NodeBuilder(f"{activation.name}/scales")
            scales = _scale_nodes(of_scales, activation)
            if self._capabilities.activations == _UINT8:
                codes = _unsigned_products(builder, activation, scales)
            else:
                codes = _signed_products(builder, activation, scales)
            self._graph.insert_before(before, [*of_scales.nodes, *builder.nodes])
            self._products[activation] = codes, scales.token
        return self._products[activation]


def _scale_nodes(builder: NodeBuilder, activation: Activation) -> _Scales:
    """Adds numerics section 3 (or one scale per group), operator for operator as the canonical functions have it."""
    x, leading, grid = activation.x, _leading(activation), _grid(activation)
    groups = activation.groups
    magnitude = builder.op("Abs", "Abs", [x], _FLOAT, tuple(x.shape or ()))
    if not activation.per_token:
        target = builder.ints("grid", [*_copied(leading), groups, activation.group_size])
        magnitude = builder.op("Reshape", "Reshape", [magnitude, target], _FLOAT, (*grid, activation.group_size))
    last = builder.ints("last", [-1])
    keep = {"keepdims": int(activation.per_token)}
    peak = builder.op("peak", "ReduceMax", [magnitude, last], _FLOAT, grid, keep)
    largest = builder.constant("largest", np.float32(activation.largest_code))
    amplitude = builder.op("amplitude", "Div", [peak, largest], _FLOAT, grid)
    if not activation.two_level:
        scale = _nonzero(builder, amplitude, grid)
        return _Scales(scale, scale, None)
    per_token = (*leading, 1)
    loudest = builder.op("loudest", "ReduceMax", [amplitude, last], _FLOAT, per_token, {"keepdims": 1})
    fifteen = builder.constant("fifteen", np.float32(15))
    step = builder.op("step", "Div", [loudest, fifteen], _FLOAT, per_token)
    divisor = _nonzero(builder, step, per_token)
    ratio = builder.op("ratio", "Div", [amplitude, divisor], _FLOAT, grid)
    raised = builder.op("Ceil", "Ceil", [ratio], _FLOAT, grid)
    one = builder.constant("least", np.float32(1))
    multipliers = builder.op("multipliers", "Clip", [raised, one, fifteen], _FLOAT, grid)
    return _Scales(builder.op("scale", "Mul", [multipliers, divisor], _FLOAT, grid), divisor, multipliers)


def _nonzero(builder: NodeBuilder, scale: ir.Value, shape: tuple[Dim, ...]) -> ir.Value:
    # The canonical graph has 1 where this has the smallest positive number: only where all codes are 0 anyway.
    least = builder.constant("least_scale", np.float32(np.finfo(np.float32).smallest_subnormal))
    return builder.op("Max", "Max", [scale, least], _FLOAT, shape)


def _unsigned_products(builder: NodeBuilder, activation: Activation, scales: _Scales) -> ir.Value:
    """Adds one pass over the floats and one over the codes; the result is around a zero point of 128."""
    x, grid = activation.x, _grid(activation)
    shape = tuple(x.shape or ())
    sizes = builder.op("Shape", "Shape", [scales.blocked], ir.DataType.INT64, (len(grid),))
    value = {"value": ir.tensor(np.array([128], np.uint8))}
    middle = ir.node("ConstantOfShape", [sizes], value, name=f"{activation.name}/products/middle")
    middle.outputs[0].name = f"{middle.name}_output_0"
    middle.outputs[0].dtype, middle.outputs[0].shape = _UINT8, ir.Shape(grid)
    builder.nodes.append(middle)
    blocked = {"axis": -1, "block_size": activation.group_size}
    codes = builder.op("codes", "QuantizeLinear", [x, scales.blocked, middle.outputs[0]], _UINT8, shape, blocked)
    if scales.multipliers is None:
        return codes
    leading, groups = _leading(activation), activation.groups
    split = builder.ints("grid", [*_copied(leading), groups, activation.group_size])
    column = builder.ints("column", [*_copied(leading), groups, 1])
    by_group = builder.op("Reshape", "Reshape", [codes, split], _UINT8, (*grid, activation.group_size))
    factors = builder.op("Cast", "Cast", [scales.multipliers], _UINT8, grid, {"to": int(_UINT8)})
    factors = builder.op("Reshape_1", "Reshape", [factors, column], _UINT8, (*grid, 1))
    one = builder.constant("one", np.float32(1))
    zero, zero_point = builder.constant("zero", np.uint8(0)), builder.constant("zero_point", np.uint8(128))
    inputs = [by_group, one, zero_point, factors, one, zero, one, zero_point]
    products = builder.op(
        "QLinearMul", "QLinearMul", inputs, _UINT8, (*grid, activation.group_size), domain="com.microsoft"
    )
    flat = builder.ints("flat", [*_copied(leading), activation.channels])
    return builder.op("Reshape_2", "Reshape", [products, flat], _UINT8, shape)


def _signed_products(builder: NodeBuilder, activation: Activation, scales: _Scales) -> ir.Value:
    """Adds standard operators only."""
    x, shape = activation.x, tuple(activation.x.shape or ())
    blocked = {"axis": -1, "block_size": activation.group_size}
    attributes = {**blocked, "output_dtype": int(_INT8)}
    codes = builder.op("codes", "QuantizeLinear", [x, scales.blocked], _INT8, shape, attributes)
    if scales.multipliers is None:
        return codes
    products = builder.op("products", "DequantizeLinear", [codes, scales.multipliers], _FLOAT, shape, blocked)
    return builder.op("Cast", "Cast", [products], _INT8, shape, {"to": int(_INT8)})


def _leading(activation: Activation) -> tuple[Dim, ...]:
    return tuple(activation.x.shape or ())[:-1]


def _grid(activation: Activation) -> tuple[Dim, ...]:
    return (*_leading(activation), activation.groups)


def _copied(leading: tuple[Dim, ...]) -> list[int]:
    # A 0 in Reshape's target copies that axis.
    return [0] * len(leading)
