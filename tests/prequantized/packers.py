"""Writes weights in the layouts of quantizers, one element at a time, from the layouts' published descriptions.

compressed-tensors is written by its own package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

Tensors = dict[str, torch.Tensor]

# AutoAWQ, awq/utils/packing_utils.py: nibble i of a word, lowest first, holds this one of eight output channels.
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Quantized:
    """A weight as integers: `W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g]`, `g = groups[k]`.

    Attributes:
        codes: `[N, K]`, from 0 to 2^bits - 1.
        zeros: `[N, G]`, in the same range.
        scales: float16 `[N, G]`.
        groups: `[K]`.
        bits: 4 or 8.
        group_size: Columns per group; -1 for all.
    """

    codes: npt.NDArray[np.int64]
    zeros: npt.NDArray[np.int64]
    scales: npt.NDArray[np.float16]
    groups: npt.NDArray[np.int64]
    bits: int
    group_size: int

    @property
    def symmetric(self) -> bool:
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def weight(self) -> npt.NDArray[np.float32]:
        """The weight; float32 holds every product of an integer below 2^9 and a float16 exactly."""
        rows, columns = self.codes.shape
        values = np.empty((rows, columns), np.float32)
        for n in range(rows):
            for k in range(columns):
                g = self.groups[k]
                values[n, k] = float(self.codes[n, k] - self.zeros[n, g]) * float(self.scales[n, g])
        return values


def draw(
    rows: int,
    columns: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool = False,
    lowest_zero: int = 0,
) -> Quantized:
    """Draws integers and scales at random; every code appears in a large enough weight."""
    rng = np.random.default_rng(rows * 1000 + columns + bits)
    count = 1 if group_size == -1 else -(-columns // group_size)
    groups = np.zeros(columns, np.int64) if group_size == -1 else np.arange(columns) // group_size
    middle = np.full((rows, count), 2 ** (bits - 1))
    return Quantized(
        codes=rng.integers(0, 2**bits, (rows, columns)),
        zeros=middle if symmetric else rng.integers(lowest_zero, 2**bits, (rows, count)),
        scales=rng.uniform(0.001, 0.1, (rows, count)).astype(np.float16),
        groups=rng.permutation(groups) if act_order else groups,
        bits=bits,
        group_size=group_size,
    )


def quantize(weight: npt.NDArray[np.float32], *, bits: int, group_size: int, symmetric: bool) -> Quantized:
    """Rounds a weight to the nearest grid point, as a plain quantizer would."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = np.arange(columns) // size
    top = 2**bits - 1
    blocks = weight.reshape(rows, -1, size).astype(np.float64)
    low, high = np.minimum(blocks.min(-1), -1e-3), np.maximum(blocks.max(-1), 1e-3)
    spread = 2 * np.maximum(-low, high) if symmetric else high - low
    scales = (spread / top).astype(np.float16)
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if symmetric else np.rint(-low / scales)
    zeros = np.clip(zeros, 1, top).astype(np.int64)
    codes = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, top).astype(np.int64)
    return Quantized(codes.reshape(rows, columns), zeros, scales, groups, bits, group_size)


def _words(
    shape: tuple[int, int], place: Callable[[int, int], tuple[int, int, int]], size: tuple[int, int], value: Any
) -> torch.Tensor:
    """Packs `value[i, j]` of `size` into 32-bit words of `shape`; `place(i, j)` is its word and its lowest bit."""
    words = [[0] * shape[1] for _ in range(shape[0])]
    for i in range(size[0]):
        for j in range(size[1]):
            row, column, bit = place(i, j)
            words[row][column] |= int(value[i, j]) << bit
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def pack_gptq(q: Quantized, *, version: int = 1, g_idx: bool = True) -> Tensors:
    """AutoGPTQ `QuantLinear.pack`; version 1 stores zero points minus one."""
    (rows, columns), per_word = q.codes.shape, 32 // q.bits
    count = q.scales.shape[1]
    stored_zeros = q.zeros.T - (1 if version == 1 else 0)
    assert stored_zeros.min() >= 0, "version 1 cannot store a zero point of 0"
    tensors = {
        "qweight": _words(
            (-(-columns // per_word), rows),
            lambda k, n: (k // per_word, n, q.bits * (k % per_word)),
            (columns, rows),
            q.codes.T,
        ),
        "qzeros": _words(
            (count, -(-rows // per_word)),
            lambda g, n: (g, n // per_word, q.bits * (n % per_word)),
            (count, rows),
            stored_zeros,
        ),
        "scales": torch.from_numpy(np.ascontiguousarray(q.scales.T)),
    }
    if g_idx:
        tensors["g_idx"] = torch.from_numpy(q.groups.astype(np.int32))
    return tensors


def pack_awq(q: Quantized) -> Tensors:
    """AutoAWQ `WQLinear_GEMM.from_linear`."""
    (rows, columns), count = q.codes.shape, q.scales.shape[1]

    def place(i: int, n: int) -> tuple[int, int, int]:
        return i, n // 8, 4 * AWQ_NIBBLES.index(n % 8)

    return {
        "qweight": _words((columns, -(-rows // 8)), place, (columns, rows), q.codes.T),
        "qzeros": _words((count, -(-rows // 8)), place, (count, rows), q.zeros.T),
        "scales": torch.from_numpy(np.ascontiguousarray(q.scales.T)),
    }


def scheme(q: Quantized, strategy: str) -> QuantizationScheme:
    """The compressed-tensors scheme of a weight."""
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=q.bits,
            strategy=strategy,
            group_size=q.group_size if strategy == "group" else None,
            symmetric=q.symmetric,
        ),
    )


def compress(q: Quantized, stored: str, strategy: str | None = None) -> Tensors:
    """Packs a weight with the compressed-tensors package, which finds the codes by dividing by the scales."""
    strategy = strategy or ("channel" if q.group_size == -1 else "group")
    half = 2 ** (q.bits - 1)
    state = {
        "weight": torch.from_numpy(q.weight()),
        "weight_scale": torch.from_numpy(q.scales).float(),
        "weight_zero_point": torch.from_numpy(q.zeros - half).to(torch.int8),
    }
    if strategy == "tensor":
        state |= {name: state[name][:1, 0] for name in ("weight_scale", "weight_zero_point")}
    compressor = BaseCompressor.get_value_from_registry(stored)
    tensors: Tensors = compressor.compress(state, scheme(q, strategy))
    tensors["weight_scale"] = tensors["weight_scale"].half()
    return tensors
