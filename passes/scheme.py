"""How a linear layer is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Scales: TypeAlias = Literal["two-level", "one-level"]


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantized.

    Attributes:
        weights: `int4`: groups of channels share a scale. `int8`: so too if activations are float; with 8-bit
            activations each output channel has one scale, so that the layer is one integer product.
        activations: `int4`: groups per token; `int8`: one scale per token; both computed at run time. None: float.
        scales: Form of the group scales of 4-bit tensors: `two-level`, integer multipliers of one float step per vector
            (numerics section 3), or `one-level`, a float for each group.
    """

    weights: Literal["int4", "int8"]
    activations: Literal["int4", "int8"] | None
    scales: Scales = "two-level"

    def weight_group(self, channels: int, group_size: int) -> int:
        """Returns how many of a weight's input channels share a scale."""
        return channels if (self.weights, self.activations) == ("int8", "int8") else group_size

    def activation_group(self, channels: int, group_size: int) -> int:
        """Returns how many of an activation's channels share a scale."""
        return channels if self.activations == "int8" else group_size


W4A4 = Scheme(weights="int4", activations="int4")
W4A8 = Scheme(weights="int4", activations="int8")
W4A16 = Scheme(weights="int4", activations=None)
W8A8 = Scheme(weights="int8", activations="int8")
W8A16 = Scheme(weights="int8", activations=None)

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {"w4a4": W4A4, "w4a8": W4A8, "w4a16": W4A16, "w8a8": W8A8, "w8a16": W8A16}
)
"""The schemes by the names that recipes and manifests use; `float` is none of them."""
