"""A lowered graph, and what its layers are to run in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

# What attention and layers of 16-bit floats run in, as `inspector` reads it: weights by activations.
HALF = "float16"


@dataclass(frozen=True)
class LoweredNetwork:
    """A lowered graph.

    Attributes:
        model: The graph.
        requested: The precision of each layer in the canonical graph, by node: `w4a4`, `float16`, ...
        expected: What the network's types ask the builder for, by node: `int4 x float32` (weights by activations),
            `float16` (attention), `plugin`, ...
    """

    model: ir.Model
    requested: Mapping[str, str]
    expected: Mapping[str, str]
