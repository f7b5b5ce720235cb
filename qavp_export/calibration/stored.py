"""Weights that calibration rounded, kept on disk until the graph is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.numerics.one_level import OneLevel
from qavp_export.numerics.two_level import TwoLevel
from qavp_export.passes import Quantized, RoundWeights, Scheme, WeightQuantizer


class StoredWeights(WeightQuantizer):
    """Gives the graph the codes that calibration chose, and rounds what it left out.

    Args:
        folder: An empty folder.
        rounding: Rounds the weights that were not stored.
    """

    def __init__(self, folder: Path, rounding: RoundWeights) -> None:
        self._folder = folder
        self._rounding = rounding
        self._files: dict[str, Path] = {}

    def put(self, weight: str, quantized: Quantized, error: float) -> None:
        """Stores a weight's codes and scales.

        Args:
            weight: Name of the weight's initializer.
            quantized: 4-bit codes `[N,K]`, K even, and their scales.
            error: Relative error of the weight.
        """
        path = self._folder / f"{len(self._files)}.npz"
        scales = (
            {"multipliers": quantized.multipliers, "steps": quantized.steps}
            if isinstance(quantized, TwoLevel)
            else {"scales": quantized.scales}
        )
        np.savez(path, codes=_pack(quantized.codes), **scales)
        self._files[weight] = path
        self._rounding.errors[weight] = error

    def __call__(self, weight: ir.Value, scheme: Scheme, group_size: int) -> Quantized:
        """See `WeightQuantizer`."""
        path = self._files.get(str(weight.name))
        if path is None:
            return self._rounding(weight, scheme, group_size)
        with np.load(path, allow_pickle=False) as parts:
            codes = _unpack(parts["codes"])
            if "steps" in parts:
                return TwoLevel(codes, parts["multipliers"], parts["steps"])
            return OneLevel(codes, parts["scales"])


def _pack(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Packs two 4-bit codes into a byte, the first in the low half."""
    unsigned = codes.view(np.uint8)
    return (unsigned[:, 0::2] & np.uint8(15)) | (unsigned[:, 1::2] << np.uint8(4))


def _unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    # Shifting a signed byte right keeps its sign.
    codes[:, 0::2] = (packed << np.uint8(4)).view(np.int8) >> np.int8(4)
    codes[:, 1::2] = packed.view(np.int8) >> np.int8(4)
    return codes
