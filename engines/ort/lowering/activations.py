"""Quantizes activations at run time, in as few operators as possible, once for each value that is quantized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.activation import Activation
from qavp_export.engines.ort.lowering.capabilities import Capabilities
from qavp_export.passes._builder import Dim, NodeBuilder

_FLOAT, _UINT8, _INT8 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8
_EXTREMES = ("ReduceMax", "ReduceMin")


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
    """Adds numerics section 3 (or one scale per group), whose arithmetic is that of the canonical functions."""
    x, leading, grid = activation.x, _leading(activation), _grid(activation)
    groups = activation.groups
    last = builder.ints("last", [-1])
    if activation.per_token:
        # Of long rows: to read them twice takes half as long as to write magnitudes and read those.
        high, low = (builder.op(name, name, [x, last], _FLOAT, grid, {"keepdims": 1}) for name in _EXTREMES)
        peak = builder.op("peak", "Max", [high, builder.op("Neg", "Neg", [low], _FLOAT, grid)], _FLOAT, grid)
    else:
        magnitude = builder.op("Abs", "Abs", [x], _FLOAT, tuple(x.shape or ()))
        target = builder.ints("grid", [*_copied(leading), groups, activation.group_size])
        magnitude = builder.op("Reshape", "Reshape", [magnitude, target], _FLOAT, (*grid, activation.group_size))
        peak = builder.op("peak", "ReduceMax", [magnitude, last], _FLOAT, grid, {"keepdims": 0})
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
    """Adds codes, times their multipliers if there are any, around a zero point of 128."""
    x, grid = activation.x, _grid(activation)
    shape = tuple(x.shape or ())
    blocked = {"axis": -1, "block_size": activation.group_size}
    if scales.multipliers is None:
        sizes = builder.op("Shape", "Shape", [scales.blocked], ir.DataType.INT64, (len(grid),))
        value = {"value": ir.tensor(np.array([128], np.uint8))}
        middle = ir.node("ConstantOfShape", [sizes], value, name=f"{activation.name}/products/middle")
        middle.outputs[0].name = f"{middle.name}_output_0"
        middle.outputs[0].dtype, middle.outputs[0].shape = _UINT8, ir.Shape(grid)
        builder.nodes.append(middle)
        return builder.op("codes", "QuantizeLinear", [x, scales.blocked, middle.outputs[0]], _UINT8, shape, blocked)
    blocked["output_dtype"] = int(_INT8)
    codes = builder.op("codes", "QuantizeLinear", [x, scales.blocked], _INT8, shape, blocked)
    # Each row is a group, whose multiplier is its scale: to floats and back is faster than QLinearMul on bytes.
    row = (ir.SymbolicDim("_".join(str(size) for size in grid)), activation.group_size)
    by_group = builder.op("Reshape", "Reshape", [codes, builder.ints("rows", [-1, row[1]])], _INT8, row)
    factors = builder.op("Reshape_1", "Reshape", [scales.multipliers, builder.ints("row", [-1])], _FLOAT, row[:1])
    floats = builder.op("DequantizeLinear", "DequantizeLinear", [by_group, factors], _FLOAT, row, {"axis": 0})
    one, zero_point = builder.constant("one", np.float32(1)), builder.constant("zero_point", np.uint8(128))
    products = builder.op("QuantizeLinear", "QuantizeLinear", [floats, one, zero_point], _UINT8, row)
    flat = builder.op("flat", "Shape", [x], ir.DataType.INT64, (len(shape),))
    return builder.op("Reshape_2", "Reshape", [products, flat], _UINT8, shape)


def _signed_products(builder: NodeBuilder, activation: Activation, scales: _Scales) -> ir.Value:
    """Adds plain arithmetic: the CUDA provider's QuantizeLinear knows no blocks."""
    leading, groups, group_size = _leading(activation), activation.groups, activation.group_size
    shape, grid = tuple(activation.x.shape or ()), (*leading, activation.groups, activation.group_size)
    split = builder.ints("grid", [*_copied(leading), groups, group_size])
    column = builder.ints("column", [*_copied(leading), groups, 1])
    by_group = builder.op("Reshape", "Reshape", [activation.x, split], _FLOAT, grid)
    scale = builder.op("Reshape_1", "Reshape", [scales.blocked, column], _FLOAT, (*grid[:-1], 1))
    # The scale is the largest magnitude over the largest code: nothing is beyond the codes' range.
    codes = builder.op("codes", "Round", [builder.op("Div", "Div", [by_group, scale], _FLOAT, grid)], _FLOAT, grid)
    if scales.multipliers is not None:
        factors = builder.op("Reshape_2", "Reshape", [scales.multipliers, column], _FLOAT, (*grid[:-1], 1))
        codes = builder.op("Mul", "Mul", [codes, factors], _FLOAT, grid)
    flat = builder.ints("flat", [*_copied(leading), activation.channels])
    products = builder.op("products", "Reshape", [codes, flat], _FLOAT, shape)
    return builder.op("Cast", "Cast", [products], _INT8, shape, {"to": int(_INT8)})


def _leading(activation: Activation) -> tuple[Dim, ...]:
    return tuple(activation.x.shape or ())[:-1]


def _grid(activation: Activation) -> tuple[Dim, ...]:
    return (*_leading(activation), activation.groups)


def _copied(leading: tuple[Dim, ...]) -> list[int]:
    # A 0 in Reshape's target copies that axis.
    return [0] * len(leading)
