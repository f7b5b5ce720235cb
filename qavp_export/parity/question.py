"""What the scorer `text` should give: CLIP as transformers loads it, compared by `numerics/`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qavp_export.engines import FloatArray, IntArray
from qavp_export.numerics.semantic import text_relevance
from qavp_export.parity.loading import load_clip
from qavp_export.text_tower import TextTower

# Lengths of the random questions, the token that ends them not counted.
_LENGTHS = (3, 6)


class QuestionReference:
    """The CLIP half of the vision reference.

    Args:
        clip: A transformers `CLIPModel` in float32.
        eos_token_id: What ends a question.

    Attributes:
        clip: The model.
    """

    def __init__(self, clip: Any, eos_token_id: int) -> None:
        self.clip = clip.eval()
        self._eos_token_id = eos_token_id

    @classmethod
    def load(cls, tower: TextTower) -> QuestionReference:
        """Loads a CLIP checkpoint."""
        return cls(load_clip(tower.checkpoint.folder), tower.eos_token_id)

    def draw(self, rng: np.random.Generator, count: int) -> IntArray:
        """Draws questions of different lengths `[count,L]`, padded on the right."""
        text = self.clip.config.text_config
        known = np.array([token for token in range(text.vocab_size) if token != self._eos_token_id])
        longest = min(max(_LENGTHS) + 1, text.max_position_embeddings)
        ids = np.full((count, longest), self._eos_token_id, np.int64)
        for row in range(count):
            length = min(_LENGTHS[row % len(_LENGTHS)], longest - 1)
            ids[row, :length] = rng.choice(known, length)
        return ids

    @contextmanager
    def relevance(self, found: list[FloatArray]) -> Iterator[None]:
        """Collects the relevance of the patches that a family's module, which holds `clip`, compares with questions."""
        embeds: dict[str, Tensor] = {}
        projections = {"image": self.clip.visual_projection, "text": self.clip.text_projection}

        def keep(name: str) -> Any:
            def observe(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                embeds[name] = output.detach()

            return observe

        handles = [module.register_forward_hook(keep(name)) for name, module in projections.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        found.append(text_relevance(embeds["image"].numpy(), embeds["text"].numpy()))

    def drop(self) -> None:
        """Frees the weights."""
        for parameter in self.clip.parameters():
            parameter.data = torch.empty(0)
