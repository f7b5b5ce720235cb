"""A lowered graph, and what its layers are to run in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.passes._infra import Refusal

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
        notes: What does not run as a plugin and why, a line each.
    """

    model: ir.Model
    requested: Mapping[str, str]
    expected: Mapping[str, str]
    notes: tuple[str, ...] = ()


def summarize(refused: Iterable[Refusal], stays: str) -> tuple[str, ...]:
    """Returns a line for each reason that nodes were refused for.

    Args:
        refused: The nodes.
        stays: What becomes of one, as in `is inlined`.
    """
    nodes: dict[str, list[str]] = {}
    for refusal in refused:
        nodes.setdefault(refusal.reason, []).append(refusal.node_name)
    return tuple(
        f"{found[0]}{f', like {len(found) - 1} more,' if found[1:] else ''} {stays}: {reason}"
        for reason, found in nodes.items()
    )
