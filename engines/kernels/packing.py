"""The weight that `w4a4_matmul` reads: two 4-bit codes a byte.

A row holds one output channel. Inside a group of G channels, byte j holds channel j in its low half and channel j + G/2
in its high half, each as `code + 8`: one tile of bytes unpacks to two tiles of channels, each contiguous like the
activations, and four codes of a 32-bit register are multiplied at once with nothing carried from one to the next.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qavp_export.errors import RecipeError
from qavp_export.numerics.two_level import CODE_MAX, CODE_MIN, MULTIPLIER_MAX

Int8 = npt.NDArray[np.int8]
Multipliers = npt.NDArray[np.int8] | npt.NDArray[np.uint8]

GROUP_SIZES = (16, 32, 64, 128, 256, 512)


def check_group_size(inputs: int, group_size: int) -> None:
    """Checks that the kernels take this group size.

    Raises:
        RecipeError: It is none of `GROUP_SIZES` or does not divide the input channels.
    """
    if group_size not in GROUP_SIZES:
        raise RecipeError(f"group size {group_size}: the W4A4 kernel takes {', '.join(map(str, GROUP_SIZES))}")
    if inputs <= 0 or inputs % group_size:
        raise RecipeError(f"group size {group_size} does not divide {inputs} input channels")


def pack_weight(codes: Int8, multipliers: Multipliers, group_size: int) -> tuple[Int8, Int8]:
    """Packs a two-level weight.

    Args:
        codes: `[K, N]` int8 in [-8, 7].
        multipliers: `[K / group_size, N]` integers in 1..15.
        group_size: Input channels that share a multiplier, one of `GROUP_SIZES`.

    Returns:
        The weight `[N, K / 2]` int8 (module docstring) and its multipliers `[N, K / group_size]` int8, both contiguous.

    Raises:
        RecipeError: The group size does not fit, the shapes differ, or a code or multiplier is out of range.
    """
    inputs, outputs = codes.shape
    check_group_size(inputs, group_size)
    groups = inputs // group_size
    if multipliers.shape != (groups, outputs):
        raise RecipeError(f"multipliers are {multipliers.shape}; a {codes.shape} weight has {(groups, outputs)}")
    if codes.size and (codes.min() < CODE_MIN or codes.max() > CODE_MAX):
        raise RecipeError(f"codes reach from {codes.min()} to {codes.max()}; 4 bits hold {CODE_MIN} to {CODE_MAX}")
    if multipliers.size and (multipliers.min() < 1 or multipliers.max() > MULTIPLIER_MAX):
        raise RecipeError(
            f"multipliers reach from {multipliers.min()} to {multipliers.max()}; they lie in 1..{MULTIPLIER_MAX}"
        )
    halves = (codes - np.int8(CODE_MIN)).view(np.uint8).T.reshape(outputs, groups, 2, group_size // 2)
    packed = halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))
    weight = np.ascontiguousarray(packed.reshape(outputs, inputs // 2)).view(np.int8)
    return weight, np.ascontiguousarray(multipliers.T.astype(np.int8))


def unpack_weight(weight: Int8, multipliers: Int8, group_size: int) -> tuple[Int8, Int8]:
    """Undoes `pack_weight`.

    Args:
        weight: `[N, K / 2]` int8.
        multipliers: `[N, K / group_size]` int8.
        group_size: As for `pack_weight`.

    Returns:
        Codes `[K, N]` and multipliers `[K / group_size, N]`, int8.

    Raises:
        RecipeError: The group size does not fit.
    """
    outputs, half = weight.shape
    check_group_size(2 * half, group_size)
    packed = weight.view(np.uint8).reshape(outputs, -1, 1, group_size // 2)
    halves = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=2)
    codes = halves.reshape(outputs, 2 * half).astype(np.int8) + np.int8(CODE_MIN)
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(multipliers.T)
