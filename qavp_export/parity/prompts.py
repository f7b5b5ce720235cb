"""The prompts that parity is checked on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qavp_export.engines import IntArray
from qavp_export.families import Plan

_TEXT_LENGTHS = (7, 4)


@dataclass(frozen=True)
class Prompts:
    """Two prompts with one image each, left padded, and the token that follows each.

    Attributes:
        ids: Token ids `[2,S]`.
        mask: 1 for tokens, 0 for padding `[2,S]`.
        next_ids: `[2,1]`.
        image_token_id: The placeholder.
    """

    ids: IntArray
    mask: IntArray
    next_ids: IntArray
    image_token_id: int

    @property
    def token_type_ids(self) -> IntArray:
        """1 for image tokens `[2,S]`."""
        types: IntArray = (self.ids == self.image_token_id).astype(np.int64)
        return types

    @property
    def positions(self) -> IntArray:
        """Position ids `[2,S]`."""
        return np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)

    @property
    def next_positions(self) -> IntArray:
        """Position ids of `next_ids` `[2,1]`."""
        return self.positions[:, -1:] + 1

    @property
    def grown_mask(self) -> IntArray:
        """Mask `[2,S+1]` of prompt and next token."""
        return np.concatenate([self.mask, np.ones_like(self.next_ids)], axis=1)


def random_prompts(rng: np.random.Generator, plan: Plan, tokens_kept: int) -> Prompts:
    """Returns prompts of random text, of different lengths, around the image's placeholders."""
    text_ids = np.array([token for token in range(plan.vocab_size) if token != plan.image_token_id])
    image = np.full(tokens_kept, plan.image_token_id)
    rows = [np.concatenate([rng.choice(text_ids, 2), image, rng.choice(text_ids, length)]) for length in _TEXT_LENGTHS]
    width = max(map(len, rows))
    ids = [np.pad(row, (width - len(row), 0), constant_values=text_ids[0]) for row in rows]
    mask = [np.pad(np.ones_like(row), (width - len(row), 0)) for row in rows]
    next_ids = rng.choice(text_ids, (len(rows), 1)).astype(np.int64)
    return Prompts(np.stack(ids).astype(np.int64), np.stack(mask).astype(np.int64), next_ids, plan.image_token_id)
