"""GPTQ as AutoGPTQ and GPTQModel store it (Frantar et al., ICLR 2023; `QuantLinear` of either library).

    qweight  int32 [K * bits / 32, N]   a word holds 32 / bits input channels, the first in the lowest bits
    qzeros   int32 [G, N * bits / 32]   zero points, packed along the output channels
    scales   float [G, N]
    g_idx    int32 [K]                  the group of each input channel; consecutive if it is missing

`W[n, k] = (q[k, n] - z[g, n]) * s[g, n]` with `g = g_idx[k]`. Version 1 of the format (`checkpoint_format: gptq`)
stores `z - 1`, version 2 (`gptq_v2`) stores `z`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qavp_export.prequantized.base import INDEX_DTYPES, PACKED_DTYPES, SCALE_DTYPES, Layout, ModuleTensors, Part
from qavp_export.prequantized.config import group_size, option, refuse, refuse_overrides
from qavp_export.prequantized.integers import FloatArray, dequantize, unpack, words


def parse(config: Mapping[str, Any]) -> Layout:
    """Returns the layout that a `quantization_config` of method `gptq` describes.

    Raises:
        CheckpointError: A setting is not supported.
    """
    formats = ("gptq", "gptq_v2")
    version = option(config, "checkpoint_format", formats, option(config, "format", formats, "gptq"))
    refuse(config, "is_marlin_format", "weights in that order are for one GPU kernel")
    refuse(config, "rotation", "the model computes rotations that its weights alone do not show")
    refuse(config, "adapter", "the weights are not complete without it")
    option(config, "pack_dtype", ("int32",), "int32")
    refuse_overrides(config)
    return Gptq(
        bits=option(config, "bits", (4, 8)),
        group_size=group_size(config),
        symmetric=option(config, "sym", (True, False), True),
        activations=None,
        version=2 if version == "gptq_v2" else 1,
        act_order=option(config, "desc_act", (True, False), False),
        subtracts_words=_by_gptqmodel(config.get("meta")),
    )


@dataclass(frozen=True)
class Gptq(Layout):
    """AutoGPTQ's and GPTQModel's layout.

    Attributes:
        version: Of the format: 1 stores zero points minus one.
        act_order: Whether a module's groups are not runs of neighbours, so that it must have `g_idx`.
        subtracts_words: Whether the one of version 1 was subtracted from whole words, so that a zero point of 0
            borrowed from its neighbours.
    """

    version: int
    act_order: bool
    subtracts_words: bool
    method: ClassVar[str] = "gptq"
    own_parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def _parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = self._group_count(columns)
        return {
            "qweight": Part((words(columns, self.bits), rows), PACKED_DTYPES),
            "qzeros": Part((groups, words(rows, self.bits)), PACKED_DTYPES),
            "scales": Part((groups, rows), SCALE_DTYPES),
            "g_idx": Part((columns,), INDEX_DTYPES),
        }

    def _optional(self) -> tuple[str, ...]:
        return () if self.act_order else ("g_idx",)

    def _read(self, tensors: ModuleTensors, rows: int, columns: int) -> FloatArray:
        count = self._group_count(columns)
        scales = tensors.scales("scales", (count, rows))
        zeros = self._zeros(tensors, rows)
        groups = tensors.groups("g_idx", count) if tensors.has("g_idx") else self._consecutive(columns)
        codes = unpack(tensors.read("qweight"), self.bits, 0)[:columns]
        return dequantize(codes.T, zeros.T, scales.T, groups)

    def _zeros(self, tensors: ModuleTensors, rows: int) -> npt.NDArray[np.int16]:
        """Returns the zero points, int16 `[G, N]`."""
        packed, top = tensors.read("qzeros"), 2**self.bits - 1
        stored = unpack(packed, self.bits, 1)[:, :rows].astype(np.int16)
        if self.symmetric:
            # Some tools that say version 1 store the zero point itself (vLLM pull request 38966). Where it is known,
            # both are understood.
            middle = 2 ** (self.bits - 1)
            if not any((stored == middle - offset).all() for offset in range(3 - self.version)):
                raise tensors.damaged("qzeros", f"has zero points other than {middle}, though sym is true")
            return np.full_like(stored, middle)
        if self.version == 2:
            return stored
        if not (stored == top).any():
            return stored + np.int16(1)
        if not self.subtracts_words:
            raise tensors.damaged(
                "qzeros",
                f"has zero point {top + 1}, outside 0..{top} (version 1 of the format cannot hold 0; "
                "checkpoint_format gptq_v2 can)",
            )
        one_in_each = np.uint32((2**32 - 1) // top)
        return unpack(packed.view("<u4") + one_in_each, self.bits, 1)[:, :rows].astype(np.int16)


def _by_gptqmodel(meta: object) -> bool:
    """Whether the `meta` of a configuration names GPTQModel as its quantizer: `{"quantizer": ["gptqmodel:1.4.0"]}`."""
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(isinstance(name, str) and name.lower().startswith("gptqmodel:") for name in names)
