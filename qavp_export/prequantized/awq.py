"""AWQ as AutoAWQ stores it, version `gemm` (Lin et al., MLSys 2024; AutoAWQ `awq/modules/linear/gemm.py`).

    qweight  int32 [K, N / 8]       a word holds eight output channels, interleaved
    qzeros   int32 [K / G, N / 8]   the zero points, packed alike
    scales   float [K / G, N]

`W[n, k] = (q[k, n] - z[k // G, n]) * s[k // G, n]`, codes and zero points in [0, 15].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from qavp_export.prequantized.base import PACKED_DTYPES, SCALE_DTYPES, Layout, ModuleTensors, Part
from qavp_export.prequantized.config import group_size, option, refuse_overrides, unsupported
from qavp_export.prequantized.integers import FloatArray, dequantize, unpack, words

# Nibble i of a word, from the lowest up, holds channel _ORDER[i] of the eight.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def parse(config: Mapping[str, Any]) -> Layout:
    """Returns the layout that a `quantization_config` of method `awq` describes.

    Raises:
        CheckpointError: A setting is not supported.
    """
    # GPTQModel calls checkpoint_format what AutoAWQ calls version. Other versions order the words otherwise.
    for key in ("version", "checkpoint_format", "format"):
        option(config, key, ("gemm",), "gemm")
    if config.get("backend") == "llm-awq":
        raise unsupported("has backend llm-awq, which stores weights in another layout than gemm")
    refuse_overrides(config)
    return Awq(
        bits=option(config, "bits", (4,)),
        group_size=group_size(config),
        symmetric=not option(config, "zero_point", (True, False), True),
        activations=None,
    )


class Awq(Layout):
    """AutoAWQ's `gemm` version."""

    method: ClassVar[str] = "awq"
    own_parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def _parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups, packed_rows = self._group_count(columns), words(rows, self.bits)
        return {
            "qweight": Part((columns, packed_rows), PACKED_DTYPES),
            "qzeros": Part((groups, packed_rows), PACKED_DTYPES),
            "scales": Part((groups, rows), SCALE_DTYPES),
        }

    def _read(self, tensors: ModuleTensors, rows: int, columns: int) -> FloatArray:
        scales = tensors.scales("scales", (self._group_count(columns), rows))
        zeros = unpack(tensors.read("qzeros"), self.bits, 1, _ORDER)[:, :rows]
        middle = 2 ** (self.bits - 1)
        if self.symmetric and (zeros != middle).any():
            raise tensors.damaged("qzeros", f"has zero points other than {middle}, though zero_point is false")
        codes = unpack(tensors.read("qweight"), self.bits, 1, _ORDER)[:, :rows]
        return dequantize(codes.T, zeros.T.astype(np.int16), scales.T, self._consecutive(columns))
