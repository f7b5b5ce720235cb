"""Brings linear layers to forms that TensorRT has kernels for, without changing what they compute beyond rounding."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qavp_export.engines.lowering.linear import QuantizedLinear, quantized_linears
from qavp_export.engines.tensorrt.lowering.half import HalfProducts, release, stored_weight
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._linear import input_of, name_of

Array = NDArray[Any]

_FLOAT, _HALF, _INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
_NAMES = {_FLOAT: "float32", _HALF: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_LARGEST_CODE, _LEAST_CODE = 127, -128


def lower_quantized(graph: ir.Graph) -> dict[str, str]:
    """Rewrites quantized linear layers.

    1. Weight scales of two levels are multiplied before the build: TensorRT reads no 8-bit unsigned initializers. The
       products are the canonical graph's, to the last bit.
    2. Activations of 8 bits are rounded in float32, by the same arithmetic: TensorRT's 8-bit quantizer takes constant
       scales only. Those of 4 bits stay quantizers.
    3. Weights of 8 bits with a scale for each group are dequantized to FLOAT16 before the build, and multiplied so:
       the builder would dequantize them anew in every run.

    Args:
        graph: A graph; what is no longer used stays in it.

    Returns:
        What each layer's types ask for, by node; see `LoweredNetwork.expected`.
    """
    expected: dict[str, str] = {}
    halves = HalfProducts(graph)
    rounded: dict[ir.Value, ir.Value] = {}
    for layer in list(quantized_linears(graph)):
        _round_activation(graph, layer, rounded)
        is_int8 = layer.codes.dtype == _INT8
        if is_int8 and layer.block != layer.sizes[0]:
            layer.node.replace_input_with(1, _dequantized(graph, layer))
            halves.run_in_half(layer.node)
            expected[name_of(layer.node)] = "float16 x float16"
            continue
        if is_int8:
            _one_axis(graph, layer)
        elif "steps" in layer.scales:
            _dequantizer(layer).replace_input_with(1, _scales(graph, layer))
        expected[name_of(layer.node)] = f"{'int8' if is_int8 else 'int4'} x float32"
    return expected


def lower_floats(graph: ir.Graph) -> dict[str, str]:
    """Lets linear layers whose weights are stored in 16 bits multiply in 16 bits.

    Args:
        graph: A graph; what is no longer used stays in it.

    Returns:
        What each float layer's types ask for, by node.
    """
    expected: dict[str, str] = {}
    halves = {dtype: HalfProducts(graph, dtype) for dtype in (_HALF, ir.DataType.BFLOAT16)}
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = stored_weight(input_of(node, 1))
        if weight is None or weight.dtype not in _NAMES or input_of(node, 0).dtype != _FLOAT:
            continue
        if weight.dtype in halves:
            halves[weight.dtype].run_in_half(node)
        expected[name_of(node)] = f"{_NAMES[weight.dtype]} x {_NAMES[weight.dtype]}"
    return expected


def _dequantizer(layer: QuantizedLinear) -> ir.Node:
    node = input_of(layer.node, 1).producer()
    if node is None:
        raise TypeError(f"the weight of {layer.node.name} is not computed")
    return node


def _round_activation(graph: ir.Graph, layer: QuantizedLinear, rounded: dict[ir.Value, ir.Value]) -> None:
    """Replaces quantizer and dequantizer of 8 bits; layers that read the same value share what is put there."""
    activation = layer.activation
    if activation is None or activation.bits != 8:
        return
    old = input_of(layer.node, 0)
    if old not in rounded:
        builder, shape = NodeBuilder(f"{activation.name}/rounded"), tuple(old.shape or ())
        dequantize = old.producer()
        if dequantize is None:
            raise TypeError(f"{old.name} is not computed")
        scale = input_of(dequantize, 1)
        if not activation.per_token:
            raise TypeError(f"{old.name} has a scale for each group of 8-bit codes")
        ratio = builder.op("Div", "Div", [activation.x, scale], _FLOAT, shape)
        nearest = builder.op("Round", "Round", [ratio], _FLOAT, shape)
        bounds = [builder.constant(f"{number}", np.float32(number)) for number in (_LEAST_CODE, _LARGEST_CODE)]
        codes = builder.op("Clip", "Clip", [nearest, *bounds], _FLOAT, shape)
        rounded[old] = builder.op("Mul", "Mul", [codes, scale], _FLOAT, shape)
        graph.insert_before(layer.node, builder.nodes)
    layer.node.replace_input_with(0, rounded[old])


def _one_axis(graph: ir.Graph, layer: QuantizedLinear) -> None:
    """Gives a weight with one scale for each output channel `[1,N]` the form of an axis `[N]`, which is fused."""
    dequantize, scales = _dequantizer(layer), layer.scales["scales"]
    name = f"{scales.name}.by_output"
    if name not in graph.initializers:
        _register(graph, name, (layer.sizes[1],), _FLOAT, partial(_flat, scales))
    del dequantize.attributes["block_size"]
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
    dequantize.replace_input_with(1, graph.initializers[name])


def _scales(graph: ir.Graph, layer: QuantizedLinear) -> ir.Value:
    multipliers = layer.scales["multipliers"]
    name = f"{multipliers.name}.scales"
    if name not in graph.initializers:
        read = partial(_product, multipliers, layer.scales["steps"])
        _register(graph, name, tuple(multipliers.shape.numpy() if multipliers.shape is not None else ()), _FLOAT, read)
    return graph.initializers[name]


def _dequantized(graph: ir.Graph, layer: QuantizedLinear) -> ir.Value:
    name = f"{layer.codes.name}.float16"
    if name not in graph.initializers:
        _register(graph, name, layer.sizes, _HALF, partial(_weight, layer))
    return graph.initializers[name]


def _register(graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType, read: partial[Array]) -> None:
    tensor = ir.LazyTensor(lambda: ir.tensor(read(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
    graph.register_initializer(ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor))


def _values(value: ir.Value) -> Array:
    if value.const_value is None:
        raise TypeError(f"{value.name} has no values")
    array: Array = np.array(value.const_value.numpy())
    release(value)
    return array


def _flat(scales: ir.Value) -> Array:
    return _values(scales).astype(np.float32).reshape(-1)


def _product(multipliers: ir.Value, steps: ir.Value) -> Array:
    return _values(multipliers).astype(np.float32) * _values(steps).astype(np.float32)


def _weight(layer: QuantizedLinear) -> Array:
    """Returns codes times scales `[K,N]`, in half precision."""
    scales = _values(layer.scales["scales"]).astype(np.float32)
    codes = _values(layer.codes).astype(np.float32).reshape(len(scales), layer.block, -1)
    return (codes * scales[:, None]).reshape(layer.sizes).astype(np.float16)
