"""The next token: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qavp_export.engines import FloatArray, IntArray
from qavp_export.errors import InputError, QavpError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token (the lowest id among equals).
        top_k: Keeps the k most likely tokens; 0 keeps all.
        top_p: Keeps the smallest set of most likely tokens whose probabilities reach top_p; 1 keeps all
            (nucleus sampling, Holtzman et al. 2020).
        seed: Makes a run repeatable; None draws anew each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError if a value is out of range."""
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise InputError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; give 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give a number above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}; give 0 or more, or leave it out")


class Sampler:
    """Chooses tokens for one generation. Each row draws from its own stream, whatever the batch around it."""

    def __init__(self, sampling: Sampling, rows: int, banned: int) -> None:
        """Starts the random streams; the token `banned` is never chosen."""
        self._sampling = sampling
        self._banned = banned
        root = np.random.SeedSequence(sampling.seed)
        self._streams = [np.random.default_rng(child) for child in root.spawn(rows)]

    def choose(self, logits: FloatArray, rows: NDArray[np.bool_]) -> IntArray:
        """Chooses one token for each of the given rows.

        Args:
            logits: Logits of the last position `[B, V]`.
            rows: Which rows to choose for `[B]`; the others get 0.

        Returns:
            Token ids `[B]`.

        Raises:
            QavpError: The decoder yielded NaN or infinity.
        """
        tokens = np.zeros(len(logits), dtype=np.int64)
        for row in np.flatnonzero(rows):
            scores = logits[row].astype(np.float64)
            if not np.isfinite(scores.max()):
                raise QavpError(
                    f"the decoder yielded NaN or infinity for prompt {row + 1}; "
                    "check the bundle with qavp-export --verify"
                )
            if self._banned < len(scores):
                scores[self._banned] = -np.inf
            if self._sampling.temperature == 0:
                tokens[row] = scores.argmax()
            else:
                probabilities = sampling_distribution(scores, self._sampling)
                tokens[row] = self._streams[row].choice(len(scores), p=probabilities)
        return tokens


def sampling_distribution(logits: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities to draw from, filtered in the order that transformers uses: temperature, top-k, top-p.

    Args:
        logits: Logits of one row `[V]`.
        sampling: How to sample; its temperature is positive.

    Returns:
        Probabilities `[V]` that sum to 1.
    """
    # The maximum goes first: with a tiny temperature all others may overflow to -inf, which is right.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if 0 < sampling.top_k < len(order):
        order = order[: sampling.top_k]
    kept: NDArray[np.float64] = np.exp(scaled[order])
    kept /= kept.sum()
    if sampling.top_p < 1:
        # A token stays while those before it have not reached top_p; the first always does.
        stays = np.cumsum(kept) - kept < sampling.top_p
        order, kept = order[stays], kept[stays]
    probabilities = np.zeros(len(scaled), dtype=np.float64)
    probabilities[order] = kept / kept.sum()
    return probabilities
