"""Rounds weights so that what the first tokens of a sequence yield stays what it was; needs no data.

The first token draws most of the attention in most heads (Xiao et al., "Efficient Streaming Language Models with
Attention Sinks", 2024) and has activations like no other token (Sun et al., "Massive Activations in Large Language
Models", 2024): behind the norm they are nearly the same whatever the token is, and its values are small because large
terms cancel. Rounding to nearest breaks that cancellation, and attention spreads the error to every other token. Random
tokens behind it stand for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from qavp_export.calibration.stops import find_stops
from qavp_export.calibration.stored import StoredWeights
from qavp_export.calibration.walk import Walk
from qavp_export.numerics.sink import SinkRounding
from qavp_export.passes import Scheme
from qavp_export.passes.quantizer import quantize_rows

# Output channels at a time: weights and codes of a block take 60 MB at 11008 input channels.
_ROWS = 1024


def round_for_openings(
    walk: Walk,
    model: ir.Model,
    schemes: Mapping[str, Scheme],
    group_size: int,
    weights: StoredWeights,
    progress: Callable[[int, int], None],
) -> None:
    """Rounds the 4-bit weights of a decoder.

    Args:
        walk: A walk over the float model, rotated already, on a few short sequences; all their tokens count.
        model: That model.
        schemes: The scheme of each layer by node name.
        group_size: Channels that share a scale.
        weights: Takes the rounded weights.
        progress: Called with layers done and layers in all.
    """
    done = 0
    for stop in find_stops(model, schemes):
        progress(done, len(schemes))
        walk.advance([stop.value])
        inputs = np.concatenate([x.reshape(-1, x.shape[-1]) for x in walk.read(stop.value)])
        with threadpool_limits(1):
            rounding = SinkRounding(inputs)
        for node in stop.nodes:
            weight = node.inputs[1]
            if weight is None:
                raise TypeError(f"{node.name} has no weight")
            values, two_level = walk.weight(weight), schemes[str(node.name)].scales == "two-level"
            round_rows = rounding.two_level if two_level else rounding.one_level
            quantized, error = quantize_rows(values, partial(round_rows, group_size=group_size), _ROWS)
            weights.put(str(weight.name), quantized, error)
        done += len(stop.nodes)
    progress(done, len(schemes))
