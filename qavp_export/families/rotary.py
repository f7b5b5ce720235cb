"""Rotary embeddings whose frequencies depend on the sequence, and the context that scaled ones reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qavp_export.errors import CheckpointError

_SERVED = ("default", "linear", "dynamic", "yarn", "llama3")


class DynamicRotary(nn.Module):
    """NTK-aware RoPE (`rope_type: dynamic`) as a function of the positions alone.

    transformers keeps the frequencies of the longest sequence so far in the module. While one batch grows they are
    those of its longest position, or of the original length until that is reached: what this computes.
    """

    def __init__(self, config: Any) -> None:
        """Reads the decoder's configuration."""
        super().__init__()
        rope = config.rope_parameters
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.width = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        self.theta = float(rope["rope_theta"])
        self.factor = float(rope["factor"])
        self.original = int(config.max_position_embeddings)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines `[B,S,width]`, in the type of `x`, for `position_ids [B,S]`."""
        length = torch.clamp(position_ids.max() + 1, min=self.original).float()
        stretch = self.factor * length / self.original - (self.factor - 1)
        base = self.theta * stretch ** (self.width / (self.width - 2))
        exponents = torch.arange(0, self.width, 2, device=x.device).float() / self.width
        angles = position_ids[..., None].float() * base**-exponents
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def replace_dynamic_rotary(model: nn.Module) -> None:
    """Replaces the rotary embeddings of type `dynamic` in a text model by ones that can be traced."""
    config: Any = model.config
    for name, module in list(model.named_modules()):
        if getattr(module, "rope_type", None) == "dynamic":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, DynamicRotary(config))


def context_length(text_config: Any) -> int:
    """Returns the longest sequence that a decoder serves.

    Of a scaled rotary embedding, `max_position_embeddings` may be the length before scaling.

    Raises:
        CheckpointError: The rotary embedding is of a type that is not served.
    """
    stated = int(text_config.max_position_embeddings)
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, Mapping)]
    for part in kinds or [rope]:
        kind = part.get("rope_type", "default")
        # transformers' modules for several kinds of layers keep their state under other names.
        if kind not in _SERVED or (kinds and kind == "dynamic"):
            raise CheckpointError(
                f"config.json asks for rotary embeddings of type {kind!r}, which cannot be exported; "
                f"supported: {', '.join(_SERVED)}"
            )
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    if kind in ("linear", "dynamic"):
        return int(stated * factor)
    if kind == "yarn":
        return max(stated, int(rope["original_max_position_embeddings"] * factor))
    return stated
