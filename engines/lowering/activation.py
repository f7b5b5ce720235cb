"""Reads how a canonical graph quantizes what its linear layers read."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.passes import group_scale, two_level_scale

_LARGEST_OF_4_BITS = 7.0


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
