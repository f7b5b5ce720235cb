"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffle, a linear projector and a Llama decoder.

Large images are cut into tiles, each a unit. The published SmolVLM are of model type `idefics3`, SmolVLM2 of `smolvlm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qavp_export.errors import CheckpointError
from qavp_export.families.base import Family, Plan, decoder_sizes


class Idefics3Vision(nn.Module):
    """Vision tower and connector for a batch of full tiles.

    transformers works out from a pixel mask which tiles and which of their patches are padding. A processor that cuts
    or resizes to whole tiles leaves none, so every patch has the position that it has in a full tile.
    """

    model: Any
    position_ids: Tensor

    def __init__(self, model: Any) -> None:
        """Wraps an `Idefics3Model` or a `SmolVLMModel`."""
        super().__init__()
        self.model = model
        side = int(model.vision_model.embeddings.num_patches_per_side)
        self.register_buffer("position_ids", full_tile_positions(side), persistent=False)

    def forward(self, pixel_values: Tensor, patch_relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `image_features [B,N,D]` and `token_relevance [B,N]` for tiles and their `patch_relevance [B,P]`."""
        tower, connector = self.model.vision_model, self.model.connector
        patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = patches + tower.embeddings.position_embedding(self.position_ids)
        states = tower.encoder(inputs_embeds=states, attention_mask=None).last_hidden_state
        features: Tensor = connector(tower.post_layernorm(states))
        shuffled = connector.pixel_shuffle(patch_relevance.unsqueeze(-1), connector.scale_factor)
        return features, shuffled.mean(-1)


def full_tile_positions(side: int) -> Tensor:
    """Returns the positions `[side*side]` of the patches of a tile without padding.

    By the arithmetic of `Idefics3VisionEmbeddings`, whose float32 roundings put some patches into a neighbour's bucket.
    """
    with unset_fake_temporarily():
        boundaries = torch.arange(1 / side, 1.0, 1 / side)
        fractions = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
        buckets = torch.bucketize(torch.clamp(fractions, max=1.0 - 1e-6), boundaries, right=True)
        return (buckets[:, None] * side + buckets).reshape(-1)


class Idefics3(Family):
    """`model_type: idefics3`."""

    model_type = "idefics3"
    description = "Idefics3, SmolVLM (SigLIP tower, pixel shuffle, Llama decoder)"
    scorers = ("received", "norm", "random")
    renames = ()

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of an Idefics3 model; see `Family.plan`."""
        vision, factor = config.vision_config, int(config.scale_factor)
        side = int(vision.image_size) // int(vision.patch_size)
        if side % factor:
            raise CheckpointError(
                f"a tile of {side}x{side} patches cannot be merged by scale_factor {factor} of config.json; "
                "download the checkpoint again"
            )
        return Plan(
            image_size=(int(vision.image_size), int(vision.image_size)),
            vision_tokens=(side // factor) ** 2,
            tower_patches=side**2,
            image_token_id=int(config.image_token_id),
            has_cls_token=False,
            **decoder_sizes(config.text_config),
        )

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower and connector; see `Family.vision_encoder`."""
        return Idefics3Vision(model.model)

    def text_model(self, model: Any) -> Any:
        """Returns the decoder without its head."""
        return model.model.text_model


class SmolVLM(Idefics3):
    """`model_type: smolvlm`."""

    model_type = "smolvlm"
    description = "SmolVLM2 (SigLIP tower, pixel shuffle, Llama decoder), images only"
