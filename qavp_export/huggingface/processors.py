"""What QavpModel's own generation loop does to logits and answers, as transformers' processors and criteria."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from qavp_export.engines import IntArray


class NoImageToken(LogitsProcessor):
    """Never generates the image token: the embedding would take it for an image."""

    def __init__(self, image_token_id: int) -> None:
        self._image_token_id = image_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Returns scores `[B, V]` with minus infinity for the image token."""
        return scores.index_fill(1, torch.tensor([self._image_token_id], device=scores.device), -torch.inf)


class ContextFull(StoppingCriteria):
    """Ends an answer where prompt and answer fill the context, images counted as pruned."""

    def __init__(self, room: IntArray, prompt_length: int) -> None:
        """Takes the most new tokens of each prompt `[B]`, and the length of the prompts as transformers knows them."""
        self._room = torch.from_numpy(room)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Returns which of the sequences `[B * R, S]`, R for each prompt, are full."""
        full = self._room <= input_ids.shape[1] - self._prompt_length
        return full.repeat_interleave(len(input_ids) // len(full)).to(input_ids.device)
