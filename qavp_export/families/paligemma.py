"""PaliGemma, PaliGemma 2: a SigLIP tower, a linear projector, a Gemma decoder that reads prompts in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qavp_export.families.base import CachedDecoder, Family, Plan, decoder_sizes
from qavp_export.families.llava import Llava
from qavp_export.families.masks import Indices, for_attention


class PaliGemmaVision(nn.Module):
    """Vision tower and projector of PaliGemma for a batch of images."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        """Wraps a `PaliGemmaModel`."""
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns `image_features [B,N,D]` for `pixel_values [B,3,H,W]`."""
        features: Tensor = self.model.multi_modal_projector(self.model.vision_tower(pixel_values).last_hidden_state)
        return features


class PrefixDecoder(CachedDecoder):
    """A Gemma or Gemma 2 decoder whose prompt attends to itself in both directions.

    The prompt is what comes before there is a cache. Answers are causal. As in transformers, a sliding window narrows
    the answers' view alone.
    """

    softcap: float | None

    def __init__(self, model: nn.Module, lm_head: nn.Module, softcap: float | None) -> None:
        """Wraps a text model and its output projection, whose logits are capped at `softcap`."""
        super().__init__(model, lm_head)
        self.softcap = softcap

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns logits and the grown cache; see `CachedDecoder.forward`."""
        config: Any = self.model.config
        at = Indices.of(attention_mask, inputs_embeds.shape[1])
        # The first query is the first token of all.
        is_prompt = at.queries[:1] == 0
        full = for_attention((at.causal | is_prompt) & at.valid, config._attn_implementation, inputs_embeds.dtype)
        mask: Tensor | dict[str, Tensor] = full
        if getattr(config, "sliding_window", None) is not None:
            local = (at.causal & at.within(config.sliding_window)) | is_prompt
            sliding = for_attention(local & at.valid, config._attn_implementation, inputs_embeds.dtype)
            mask = {"full_attention": full, "sliding_attention": sliding}
        # PaliGemma counts positions from 1.
        logits, present = self.run(inputs_embeds, mask, position_ids + 1, past_key_values)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits, present


class PaliGemma(Family):
    """`model_type: paligemma`."""

    model_type = "paligemma"
    description = "PaliGemma, PaliGemma 2 (SigLIP tower, linear projector, Gemma decoder)"
    scorers = ("received", "norm", "random")
    renames = Llava.renames

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of a PaliGemma model; see `Family.plan`."""
        vision = config.vision_config
        tokens = (int(vision.image_size) // int(vision.patch_size)) ** 2
        return Plan(
            image_size=(int(vision.image_size), int(vision.image_size)),
            vision_tokens=tokens,
            image_token_id=int(config.image_token_id),
            has_cls_token=False,
            **decoder_sizes(config.text_config),
        )

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower and projector; see `Family.vision_encoder`."""
        return PaliGemmaVision(model.model)

    def decoder(self, model: Any) -> nn.Module:
        """Returns the language model with its cache unpacked; see `Family.decoder`."""
        softcap = getattr(model.config.text_config, "final_logit_softcapping", None)
        return PrefixDecoder(model.model.language_model, model.lm_head, softcap)
