"""Reads back in which precision each linear layer of a graph really runs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

NVFP4 = "nvfp4"
"""The precision of a layer that multiplies FP4 by FP4."""


@dataclass(frozen=True)
class RealizedPrecision:
    """One linear layer as the graph computes it.

    Attributes:
        node: Name of the MatMul node.
        weight: Name of the initializer that holds the weight or its codes.
        precision: `w4a4`, `w8a16`, `float32`, ...: bits of weights and of activations; `float16` and `bfloat16` are
            16-bit storage with float32 arithmetic; `nvfp4` is FP4 weights times FP4 activations.
        activation: Name of the value that holds the quantized input; None if the input is float.
    """

    node: str
    weight: str
    precision: str
    activation: str | None


def realized_precision(model: ir.Model) -> list[RealizedPrecision]:
    """Returns the linear layers (MatMul or Gemm with a constant weight) of the main graph, in graph order."""
    layers = []
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        weight = _stored(node.inputs[1])
        if weight is None or weight.dtype is None:
            continue
        codes = _activation_codes(node)
        layers.append(
            RealizedPrecision(
                node=str(node.name),
                weight=str(weight.name),
                precision=_precision(weight.dtype, codes),
                activation=str(node.inputs[0].name) if codes is not None and node.inputs[0] is not None else None,
            )
        )
    return layers


def _activation_codes(node: ir.Node) -> ir.Value | None:
    """Returns the codes behind a linear layer's input, or None if it is float."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return producer.inputs[0]


def _precision(stored: ir.DataType, codes: ir.Value | None) -> str:
    if stored.is_integer():
        bits = codes.dtype.bitwidth if codes is not None and codes.dtype is not None else 16
        return f"w{stored.bitwidth}a{bits}"
    if stored == ir.DataType.FLOAT4E2M1 and codes is not None and codes.dtype == stored:
        return NVFP4
    return {ir.DataType.FLOAT: "float32"}.get(stored, stored.name.lower())


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Returns the initializer behind a weight, through dequantization, cast and transpose."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in ("DequantizeLinear", "Cast", "Transpose"):
            return None
        value = producer.inputs[0]
    return value
