"""Finds the quantized linear layers of a canonical graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.engines.lowering.activation import Activation, find_activation
from qavp_export.passes._linear import input_of

# Blocks that MatMulNBits takes, powers of two.
_LEAST_BLOCK, _GREATEST_BLOCK = 16, 256


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer `MatMul(x, DequantizeLinear(codes, scales))` of the canonical graph.

    Attributes:
        node: The MatMul.
        codes: Initializer `[K,N]`, INT4 or INT8.
        scales: Initializers by role: `multipliers [K/B,N]` and `steps [N]`, or `scales [K/B,N]`.
        block: Input channels that share a scale (B).
        activation: How its input is quantized; None if it is float.
    """

    node: ir.Node
    codes: ir.Value
    scales: Mapping[str, ir.Value]
    block: int
    activation: Activation | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Returns K and N."""
        if self.codes.shape is None:
            raise TypeError(f"{self.codes.name} has no shape")
        inputs, outputs = self.codes.shape.numpy()
        return inputs, outputs

    @property
    def one_scale_per_output(self) -> bool:
        """Whether what is left of the weight's scales behind the codes (times multipliers) is one float per output."""
        return "steps" in self.scales or self.block == self.sizes[0]

    @property
    def is_integer_product(self) -> bool:
        """Whether the layer is one product of 8-bit integers, scaled per token and per output channel."""
        if self.activation is None or not self.one_scale_per_output:
            return False
        return self.activation.two_level or self.activation.per_token

    @property
    def is_packable(self) -> bool:
        """Whether MatMulNBits can run the layer."""
        return _LEAST_BLOCK <= self.block <= _GREATEST_BLOCK and self.block & (self.block - 1) == 0

    @property
    def is_packable_to_4_bits(self) -> bool:
        """Whether MatMulNBits can run the layer on 4-bit weights."""
        return self.is_packable and self.codes.dtype == ir.DataType.INT4


def quantized_linears(graph: ir.Graph) -> Iterator[QuantizedLinear]:
    """Yields the quantized linear layers of a graph, in order."""
    for node in graph:
        if node.op_type == "MatMul" and (found := _quantized(node)) is not None:
            yield found


def _quantized(node: ir.Node) -> QuantizedLinear | None:
    dequantize = node.inputs[1].producer() if node.inputs[1] is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    codes, scales = dequantize.inputs[0], dequantize.inputs[1]
    if codes is None or scales is None or not codes.is_initializer():
        return None
    found = _scales(scales)
    if found is None:
        return None
    block = dequantize.attributes["block_size"].as_int()
    return QuantizedLinear(node, codes, found, block, find_activation(input_of(node, 0)))


def _scales(value: ir.Value) -> dict[str, ir.Value] | None:
    """Returns the initializers that a weight's scales are made of, by role."""
    if value.is_initializer():
        return {"scales": value}
    multiply = value.producer()
    if multiply is None or multiply.op_type != "Mul":
        return None
    cast, steps = input_of(multiply, 0).producer(), input_of(multiply, 1)
    if cast is None or cast.op_type != "Cast" or not steps.is_initializer():
        return None
    return {"multipliers": input_of(cast, 0), "steps": steps}
