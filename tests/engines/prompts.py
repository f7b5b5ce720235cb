"""Prompts for decoders: token ids, masks, and the answers that are given to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.engines.lowered import Array


@dataclass(frozen=True)
class Prompt:
    """A batch, padded on the left, and the answer that is given to it.

    Attributes:
        ids: `[B,S]`.
        mask: `[B,S]`.
        answer: `[B,steps]`.
        types: 1 for vision tokens `[B,S]`; None: there are none.
    """

    ids: Array
    mask: Array
    answer: Array
    types: Array | None = None

    @classmethod
    def random(cls, vocab: int, lengths: tuple[int, ...], steps: int, *, vision: slice | None = None) -> Prompt:
        """Draws tokens; `vision`: which of them are vision tokens, by column."""
        rng = np.random.default_rng(sum(lengths))
        longest = max(lengths)
        mask = np.stack([np.arange(longest) >= longest - length for length in lengths]).astype(np.int64)
        types = None
        if vision is not None:
            types = np.zeros_like(mask)
            types[:, vision] = mask[:, vision]
        return cls(rng.integers(0, vocab, mask.shape), mask, rng.integers(0, vocab, (len(lengths), steps)), types)

    @property
    def positions(self) -> Array:
        """Returns the position of each token `[B,S]`."""
        found: Array = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)
        return found
