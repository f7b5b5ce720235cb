"""InternVL in the Hugging Face format: an InternViT tower, pixel shuffle, an MLP projector, a Qwen2 or Llama decoder.

Large images are cut into tiles, each a unit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qavp_export.errors import CheckpointError
from qavp_export.families.base import Family, Plan, decoder_sizes
from qavp_export.families.llava import Llava


class InternVLVision(nn.Module):
    """Vision tower, pixel shuffle and projector of InternVL for a batch of tiles."""

    model: Any

    def __init__(self, model: nn.Module, layer: int, ratio: float) -> None:
        """Wraps an `InternVLModel`.

        Args:
            model: The `InternVLModel`.
            layer: Index into the tower's hidden states; -1 is its output, behind the last norm.
            ratio: Side of the token grid, of the side of the patch grid.
        """
        super().__init__()
        self.model = model
        self.layer = layer
        self.ratio = ratio

    def forward(self, pixel_values: Tensor, patch_relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `image_features [B,N,D]` and `token_relevance [B,N]` for tiles and their `patch_relevance [B,P]`."""
        if self.layer == -1:
            states = self.model.vision_tower(pixel_values).last_hidden_state
        else:
            states = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        features: Tensor = self.model.multi_modal_projector(self._shuffle(states[:, 1:]))
        return features, self._shuffle(patch_relevance.unsqueeze(-1)).mean(-1)

    def _shuffle(self, patches: Tensor) -> Tensor:
        """`[B,P,C]` -> `[B,N,C*P/N]`: neighbouring patches become channels."""
        batch, count, channels = patches.shape
        side = round(count**0.5)
        shuffled: Tensor = self.model.pixel_shuffle(patches.reshape(batch, side, side, channels), self.ratio)
        return shuffled.flatten(1, 2)


class InternVL(Family):
    """`model_type: internvl`."""

    model_type = "internvl"
    description = "InternVL2.5, InternVL3 in the Hugging Face format (InternViT tower, Qwen2 / Llama decoder)"
    scorers = ("cls", "received", "norm", "random")
    renames = Llava.renames

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of an InternVL model; see `Family.plan`."""
        height, width = (int(size) for size in config.vision_config.image_size)
        side = height // int(config.vision_config.patch_size[0])
        tokens_per_side = side * config.downsample_ratio
        if height != width or tokens_per_side != int(tokens_per_side):
            raise CheckpointError(
                f"vision_config.image_size {height}x{width} and downsample_ratio {config.downsample_ratio} in "
                "config.json make no square grid of whole tokens; download the checkpoint again"
            )
        if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
            raise CheckpointError(
                "config.json asks for several vision feature layers or for the [CLS] token among the features, which "
                "no published InternVL does; set vision_feature_select_strategy to 'default' and "
                "vision_feature_layer to one layer"
            )
        return Plan(
            image_size=(height, width),
            vision_tokens=int(tokens_per_side) ** 2,
            tower_patches=side**2,
            image_token_id=int(config.image_token_id),
            has_cls_token=True,
            **decoder_sizes(config.text_config),
        )

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower and projector; see `Family.vision_encoder`."""
        config = model.config
        return InternVLVision(model.model, config.vision_feature_layer, config.downsample_ratio)
