"""Rounds weights so that what the first tokens of a sequence yield stays what it was; needs no data.

The first token draws most of the attention in most heads (Xiao et al., "Efficient Streaming Language Models with
Attention Sinks", 2024) and has activations like no other token (Sun et al., "Massive Activations in Large Language
Models", 2024): behind the norm they are nearly the same whatever the token is, and its values are small because large
terms cancel. Rounding to nearest breaks that cancellation, and attention spreads the error to every other token. Random
tokens behind it stand for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qavp_export.calibration.stops import find_stops
from qavp_export.calibration.stored import StoredWeights
from qavp_export.calibration.walk import Walk
from qavp_export.numerics.sink import sink_one_level, sink_two_level
from qavp_export.passes import Scheme
from qavp_export.passes.quantizer import relative_error, squared_error


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
        for node in stop.nodes:
            weight = node.inputs[1]
            if weight is None:
                raise TypeError(f"{node.name} has no weight")
            values = walk.weight(weight)
            two_level = schemes[str(node.name)].scales == "two-level"
            quantized = (sink_two_level if two_level else sink_one_level)(values, inputs, group_size)
            weights.put(str(weight.name), quantized, relative_error(*squared_error(values, quantized)))
        done += len(stop.nodes)
    progress(done, len(schemes))
