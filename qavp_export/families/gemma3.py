"""Gemma 3: a SigLIP tower, average pooling and a decoder in which the tokens of an image attend to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qavp_export.engines import TOKEN_TYPES
from qavp_export.errors import CheckpointError
from qavp_export.families.base import BATCH, SEQUENCE, CachedDecoder, Family, GraphInput, Plan, decoder_sizes
from qavp_export.families.llava import Llava
from qavp_export.families.masks import Indices, for_attention


class Gemma3Vision(nn.Module):
    """Vision tower and projector of Gemma3 for a batch of images."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        """Wraps a `Gemma3Model`."""
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, patch_relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `image_features [B,N,D]` and `token_relevance [B,N]` for tiles and their `patch_relevance [B,P]`."""
        projector = self.model.multi_modal_projector
        features: Tensor = projector(self.model.vision_tower(pixel_values).last_hidden_state)
        side = projector.patches_per_image
        pooled: Tensor = projector.avg_pool(patch_relevance.reshape(-1, 1, side, side))
        return features, pooled.flatten(1)


class Gemma3Decoder(CachedDecoder):
    """A Gemma3 decoder whose image tokens see the whole of their image, within the sliding window where there is one.

    An image is a run of tokens with `token_type_ids` 1, as in `create_masks_for_vision_model` of transformers.
    """

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        past_key_values: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns logits and the grown cache; see `CachedDecoder.forward`.

        Args:
            inputs_embeds: `[B,S,D]`.
            attention_mask: `[B,P+S]` int64, 1 for tokens and 0 for padding.
            position_ids: `[B,S]` int64.
            token_type_ids: `[B,S]` int64, 1 for image tokens.
            past_key_values: Per layer a key and a value `[B,KV,P,head_dim]`.
        """
        config: Any = self.model.config
        at = Indices.of(attention_mask, inputs_embeds.shape[1])
        is_image = token_type_ids == 1
        starts = is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]
        # Images are numbered from 1; 0 for text and for all of the cache.
        number = torch.cumsum(starts.to(torch.int64), dim=1) * is_image.to(torch.int64)
        past = attention_mask.shape[1] - inputs_embeds.shape[1]
        of_keys = nn.functional.pad(number, (past, 0))[:, None, None, :]
        of_queries = number[:, None, :, None]
        allowed = (at.causal | ((of_queries == of_keys) & (of_queries > 0))) & at.valid
        masks = {
            kind: for_attention(mask, config._attn_implementation, inputs_embeds.dtype)
            for kind, mask in (
                ("full_attention", allowed),
                ("sliding_attention", allowed & at.within(config.sliding_window)),
            )
        }
        return self.run(inputs_embeds, masks, position_ids, past_key_values)


class Gemma3(Family):
    """`model_type: gemma3`."""

    model_type = "gemma3"
    description = "Gemma 3 (SigLIP tower, average pooling, Gemma 3 decoder)"
    scorers = ("received", "norm", "random")
    renames = Llava.renames

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of a Gemma3 model; see `Family.plan`."""
        vision, text = config.vision_config, config.text_config
        side = int(vision.image_size) // int(vision.patch_size)
        tokens_per_side = int(config.mm_tokens_per_image**0.5)
        if tokens_per_side**2 != config.mm_tokens_per_image or side % tokens_per_side:
            raise CheckpointError(
                f"{side}x{side} patches cannot be pooled to mm_tokens_per_image {config.mm_tokens_per_image} of "
                "config.json; download the checkpoint again"
            )
        if text.use_bidirectional_attention:
            raise CheckpointError(
                "config.json sets use_bidirectional_attention: such a model embeds and answers nothing"
            )
        return Plan(
            image_size=(int(vision.image_size), int(vision.image_size)),
            vision_tokens=int(config.mm_tokens_per_image),
            tower_patches=side**2,
            image_token_id=int(config.image_token_id),
            has_cls_token=False,
            **decoder_sizes(text),
        )

    def decoder_inputs(self, plan: Plan) -> tuple[GraphInput, ...]:
        """Returns which tokens are an image's; see `Family.decoder_inputs`."""
        del plan
        return (GraphInput(TOKEN_TYPES, torch.int64, ("batch", "sequence"), (BATCH, SEQUENCE)),)

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower and projector; see `Family.vision_encoder`."""
        return Gemma3Vision(model.model)

    def decoder(self, model: Any) -> nn.Module:
        """Returns the language model with its cache unpacked; see `Family.decoder`."""
        return Gemma3Decoder(model.model.language_model, model.lm_head)
