"""Weights that calibration rounds, put where the graph stores them."""

from __future__ import annotations

from collections.abc import MutableMapping

from qavp_export.passes import Quantized
from qavp_export.passes.place_qdq import stored_tensors
from qavp_export.weight_file import WeightFile


class RoundedWeights:
    """Writes 4-bit weights into the decoder's file as soon as they are rounded.

    Args:
        file: The file of the decoder's graph, its quantizers in place.
        errors: Takes the relative error of each weight, by the name of its initializer.
    """

    def __init__(self, file: WeightFile, errors: MutableMapping[str, float]) -> None:
        self._file = file
        self._errors = errors

    def holds(self, weight: str) -> bool:
        """Whether a weight has been rounded and written, in this run or in one that was interrupted."""
        return self._file.holds(f"{weight}.codes")

    def put(self, weight: str, quantized: Quantized, error: float) -> None:
        """Writes a weight's codes and scales.

        Args:
            weight: Name of the weight's initializer.
            quantized: 4-bit codes `[N,K]` and their scales.
            error: Relative error of the weight.
        """
        self._errors[weight] = error
        # Codes last: a weight whose codes are there is complete.
        for tensor in reversed(stored_tensors(weight, quantized)):
            self._file.write(str(tensor.name), tensor)
