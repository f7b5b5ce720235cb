"""How far one distribution over the next token is from another."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def log_probabilities(logits: npt.NDArray[Any], banned: int) -> Floats:
    """Log probabilities over the tokens that can be generated.

    Args:
        logits: Shape [..., V], floating point.
        banned: A token that is never generated: the image placeholder. It may lie beyond the vocabulary.

    Returns:
        Shape [..., V], float64; minus infinity at the banned token.
    """
    values = logits.astype(np.float64)
    if banned < values.shape[-1]:
        values[..., banned] = -np.inf
    values -= values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)), np.float64)


def kl_divergence(expected: Floats, found: Floats) -> Floats:
    """KL divergence `sum p (log p - log q)` in nats; where p is 0, nothing is added.

    Args:
        expected: log p, shape [..., V].
        found: log q, of that shape.

    Returns:
        Shape [...], float64.
    """
    probabilities = np.exp(expected)
    difference = np.subtract(expected, found, out=np.zeros_like(expected), where=probabilities > 0)
    return np.asarray((probabilities * difference).sum(axis=-1), np.float64)
