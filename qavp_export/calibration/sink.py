"""Rounds weights so that what the first tokens of a sequence yield stays what it was; needs no data.

The first token draws most of the attention in most heads (Xiao et al., "Efficient Streaming Language Models with
Attention Sinks", 2024) and has activations like no other token (Sun et al., "Massive Activations in Large Language
Models", 2024): behind the norm they are nearly the same whatever the token is, and its values are small because large
terms cancel. Rounding to nearest breaks that cancellation, and attention spreads the error to every other token. Random
tokens behind it stand for all others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from qavp_export.calibration.rounded import RoundedWeights
from qavp_export.calibration.stops import find_stops, weight_of
from qavp_export.calibration.walk import Walk
from qavp_export.numerics.sink import SinkRounding
from qavp_export.passes import Quantized, Scheme
from qavp_export.passes._linear import input_of
from qavp_export.passes.quantizer import quantize_rows

# Values of the largest block of rows; it takes three times as many bytes as in float32.
_BLOCK_VALUES = 1 << 25


def round_for_openings(
    walk: Walk,
    model: ir.Model,
    schemes: Mapping[str, Scheme],
    group_size: int,
    weights: RoundedWeights,
    progress: Callable[[int, int], None],
) -> None:
    """Rounds the 4-bit weights of a decoder.

    Args:
        walk: A walk over the float model, rotated already, on a few short sequences; all their tokens count.
        model: That model.
        schemes: The scheme of each layer by node name.
        group_size: Channels that share a scale.
        weights: Takes the rounded weights; those that it holds already are left as they are.
        progress: Called with layers done and layers in all.
    """
    done = 0
    for stop in find_stops(model, schemes):
        progress(done, len(schemes))
        done += len(stop.nodes)
        if all(weights.holds(weight_of(node)) for node in stop.nodes):
            continue
        walk.advance([stop.value])
        inputs = np.concatenate([x.reshape(-1, x.shape[-1]) for x in walk.read(stop.value)])
        with threadpool_limits(1):
            rounding = SinkRounding(inputs)
        for node in stop.nodes:
            if not weights.holds(weight_of(node)):
                values = walk.weight(input_of(node, 1))
                weights.put(weight_of(node), *_round(values, rounding, schemes[str(node.name)], group_size))
            # While the weight is in memory.
            walk.multiply(node)
    progress(done, len(schemes))


def _round(
    values: npt.NDArray[np.float32], rounding: SinkRounding, scheme: Scheme, group_size: int
) -> tuple[Quantized, float]:
    round_rows = rounding.two_level if scheme.scales == "two-level" else rounding.one_level
    rows = min(-(-len(values) // (os.cpu_count() or 1)), _BLOCK_VALUES // values.shape[1])
    return quantize_rows(values, partial(round_rows, group_size=group_size), rows)
