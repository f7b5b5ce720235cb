"""Lowers quantized linear layers: to one integer product each, or to `MatMulNBits` on packed weights."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.linear import QuantizedLinear, quantized_linears
from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.ort.lowering.activations import ActivationQuantizers
from qavp_export.engines.ort.lowering.capabilities import Capabilities
from qavp_export.engines.ort.lowering.weights import WeightPlans
from qavp_export.passes._builder import Dim, NodeBuilder
from qavp_export.passes._linear import input_of, name_of

Products: TypeAlias = Literal["integer", "packed"]

_FLOAT = ir.DataType.FLOAT
# Accuracy level of MatMulNBits that multiplies integers: it rounds activations to 8 bits, in blocks.
_INTEGERS = 4


def lower_linears(
    graph: ir.Graph, products: Products, capabilities: Capabilities, plans: WeightPlans
) -> dict[str, str]:
    """Rewrites the quantized linear layers of a graph.

    1. `integer`: a layer that is one product of 8-bit integers (two-level W4A4, W4A8, W8A8) becomes
       `MatMulIntegerToFloat` (or `MatMulInteger` and two products) with weights expanded to 8 bits. The integers are
       the canonical graph's.
    2. `packed`: if its weights have 4 bits they stay packed and it becomes `MatMulNBits`, which rounds its input to 8
       bits, in blocks of the weight's groups, whatever the canonical graph rounds it to.
    3. Layers that are not one integer product (float activations, one-level scales) become `MatMulNBits` in both.

    Args:
        graph: A canonical graph; what is no longer used stays in it.
        products: How layers that are integer products run.
        capabilities: What the provider runs fast.
        plans: Takes the weights.

    Returns:
        The precision that each layer runs in, by the name of its canonical node: `w4a4`, `w4a8`, ...
    """
    precision: dict[str, str] = {}
    quantizers = ActivationQuantizers(graph, capabilities)
    for layer in list(quantized_linears(graph)):
        bits = 4 if layer.codes.dtype == ir.DataType.INT4 else 8
        of_input = 32 if layer.activation is None else layer.activation.bits
        if layer.is_integer_product and (products == "integer" or not layer.is_packable_to_4_bits):
            _to_integers(graph, layer, quantizers, capabilities, plans)
        elif layer.is_packable:
            _to_packed(graph, layer, plans)
            of_input = 8
        precision[name_of(layer.node)] = f"w{bits}a{of_input}"
    return precision


def replace_by_product(
    graph: ir.Graph,
    node: ir.Node,
    activation: tuple[ir.Value, ir.Value],
    weight: ir.Value,
    scales: ir.Value,
    capabilities: Capabilities,
) -> None:
    """Puts a product of 8-bit integers, times the scales of output channels and tokens, in the place of a MatMul.

    Args:
        graph: The graph.
        node: The MatMul.
        activation: What `ActivationQuantizers.products` returns for its input.
        weight: `[K,N]`, of the type and around the zero point that the provider takes.
        scales: `[N]` float.
        capabilities: What the provider runs fast.
    """
    codes, per_token = activation
    builder, shape = NodeBuilder(name_of(node)), tuple(node.outputs[0].shape or ())
    product = _integer_matmul(builder, codes, weight, scales, shape, capabilities)
    _replace(graph, node, builder, builder.op("per_token", "Mul", [product, per_token], _FLOAT, shape))


def _integer_matmul(
    builder: NodeBuilder,
    codes: ir.Value,
    weight: ir.Value,
    scales: ir.Value,
    shape: tuple[Dim, ...],
    capabilities: Capabilities,
) -> ir.Value:
    """Adds the product of 8-bit integers, times the scales of the output channels."""
    if not capabilities.fused_scales:
        product = builder.op("MatMulInteger", "MatMulInteger", [codes, weight], ir.DataType.INT32, shape)
        product = builder.op("Cast", "Cast", [product], _FLOAT, shape, {"to": int(_FLOAT)})
        return builder.op("scaled", "Mul", [product, scales], _FLOAT, shape)
    one, zero_point = builder.constant("one", np.float32(1)), builder.constant("zero_point", np.uint8(128))
    inputs = [codes, weight, one, scales, zero_point]
    if capabilities.weights == ir.DataType.UINT8:
        inputs.append(builder.constant("weight_zero_point", np.uint8(128)))
    name = "MatMulIntegerToFloat"
    return builder.op(name, name, inputs, _FLOAT, shape, domain="com.microsoft")


def _to_integers(
    graph: ir.Graph,
    layer: QuantizedLinear,
    quantizers: ActivationQuantizers,
    capabilities: Capabilities,
    plans: WeightPlans,
) -> None:
    if layer.activation is None:
        raise TypeError(f"{layer.node.name} has a float input")
    codes, per_token = quantizers.products(layer.activation, layer.node)
    parts = {"codes": layer.codes}
    if "multipliers" in layer.scales:
        parts["multipliers"] = layer.scales["multipliers"]
    unsigned = capabilities.weights == ir.DataType.UINT8
    form = "unsigned_products" if unsigned else "products"
    weight = plans.add(graph, f"{layer.codes.name}.{form}", form, parts, capabilities.weights, layer.sizes, layer.block)
    of_output = layer.scales["steps"] if "steps" in layer.scales else layer.scales["scales"]
    scales = plans.add(graph, f"{of_output.name}.flat", "flat", {"tensor": of_output}, _FLOAT, layer.sizes[1:])
    replace_by_product(graph, layer.node, (codes, per_token), weight, scales, capabilities)


def _to_packed(graph: ir.Graph, layer: QuantizedLinear, plans: WeightPlans) -> None:
    inputs, outputs = layer.sizes
    bits = 4 if layer.codes.dtype == ir.DataType.INT4 else 8
    form, uint8, block = f"packed{bits}", ir.DataType.UINT8, layer.block
    grid = (outputs, inputs // block, block * bits // 8)
    x = input_of(layer.node, 0) if layer.activation is None else layer.activation.x
    codes = plans.add(graph, f"{layer.codes.name}.{form}", form, {"codes": layer.codes}, uint8, grid, block)
    name = f"{layer.codes.name}.block_scales"
    scales = plans.add(graph, name, "block_scales", layer.scales, _FLOAT, (outputs * (inputs // block),), block)
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": _INTEGERS}
    builder = NodeBuilder(name_of(layer.node))
    shape = tuple(layer.node.outputs[0].shape or ())
    result = builder.op(
        "MatMulNBits", "MatMulNBits", [x, codes, scales], _FLOAT, shape, attributes, domain="com.microsoft"
    )
    _replace(graph, layer.node, builder, result)


def _replace(graph: ir.Graph, node: ir.Node, builder: NodeBuilder, result: ir.Value) -> None:
    graph.insert_before(node, builder.nodes)
    replace_value(node.outputs[0], result)
