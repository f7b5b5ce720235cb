"""Tokens and scores that are hard to choose from the same way twice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qavp_export.numerics.diverse import MOST_CHANNELS

Floats = npt.NDArray[np.float32]

KINDS = 11


def draw_tokens(seed: int, images: int, tokens: int, width: int) -> tuple[Floats, Floats]:
    """Draws features and scores of kind `seed % KINDS`.

    Kinds are, in order: random; duplicates; zeros; equal scores; small integers; few directions; wide ranges; one loud
    channel; all the same; halves of codes, and values that count as nothing; channels that a sketch lets cancel, in
    part.

    Args:
        seed: Of the draw, and what is drawn.
        images: B.
        tokens: N.
        width: D.

    Returns:
        Features `[B, N, D]` and scores `[B, N]`.
    """
    rng = np.random.default_rng(seed)
    x, score = rng.standard_normal((images, tokens, width)), rng.random((images, tokens))
    match seed % KINDS:
        case 1:
            x = x[:, rng.integers(0, tokens, tokens)]
        case 2:
            x[:, rng.random(tokens) < 0.4] = 0
        case 3:
            score[:] = 0.5
        case 4:
            x, score = np.rint(x), np.rint(3 * score)
        case 5:
            x = x[:, :, :2] @ rng.standard_normal((2, width)) + 1e-3 * x
        case 6:
            x *= 10.0 ** rng.integers(-6, 4, (images, tokens, 1))
        case 7:
            x[..., 0] *= 500
        case 8:
            x[:], score[:] = x[:1, :1], 0
        case 9:
            x = rng.integers(-128, 129, x.shape) / 2
            x[..., 0] = 64
            x[:, ::3] = 1e-30 * rng.integers(-3, 4, x[:, ::3].shape)
        case 10:
            x = x[..., np.arange(width) % MOST_CHANNELS]
    return x.astype(np.float32), score.astype(np.float32)
