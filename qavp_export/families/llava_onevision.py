"""LLaVA-OneVision: a SigLIP tower, tiles of any resolution of which large grids are shrunk, and a Qwen2 decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qavp_export.errors import CheckpointError
from qavp_export.families.base import GraphInput, Plan
from qavp_export.families.llava import selection
from qavp_export.families.llava_next import TOKENS, LlavaNext, PackedVision

# Bilinear interpolation mixes this many neighbours.
_CORNERS = 4
_ANYRES = "anyres_max_"


class MixedVision(PackedVision):
    """As `PackedVision`, but every packed token is a weighted sum of four: bilinear interpolation of a large grid."""

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, token_indices: Tensor, token_weights: Tensor, patch_relevance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns `image_features [1,M,D]` and `token_relevance [1,M]`.

        Args:
            pixel_values: `[T,3,H,W]`, the tiles of one image.
            token_indices: `[M,4]` int64, rows of the flattened tile tokens.
            token_weights: `[M,4]` f32, their weights.
            patch_relevance: `[T,N]` f32.
        """
        rows, relevance = self.rows(pixel_values, patch_relevance)
        # One corner after the other: all at once would take four times the memory of the tokens.
        tokens = rows[token_indices[:, 0]] * token_weights[:, :1]
        for corner in range(1, _CORNERS):
            tokens = tokens + rows[token_indices[:, corner]] * token_weights[:, corner : corner + 1]
        return tokens.unsqueeze(0), (relevance[token_indices] * token_weights).sum(dim=1).unsqueeze(0)


class LlavaOnevision(LlavaNext):
    """`model_type: llava_onevision`."""

    model_type = "llava_onevision"
    description = "LLaVA-OneVision (SigLIP tower, tiles of any resolution, Qwen2 decoder); images, not video"
    scorers = ("received", "norm", "random")

    def vision_inputs(self, plan: Plan) -> tuple[GraphInput, ...]:
        """Returns the tiles of one image and how their tokens are packed; see `Family.vision_inputs`."""
        pixel_values, _ = super().vision_inputs(plan)
        shape, sample = ("tokens", _CORNERS), (TOKENS, _CORNERS)
        return (
            pixel_values,
            GraphInput("token_indices", torch.int64, shape, sample),
            GraphInput("token_weights", torch.float32, shape, sample),
        )

    def layout_settings(self, config: Any) -> dict[str, Any]:
        """Returns what `runtime.tiles.pack_tiles` needs; see `Family.layout_settings`.

        Raises:
            CheckpointError: The configuration limits the tiles in a way that is not known.
        """
        limit = str(config.vision_aspect_ratio).removeprefix(_ANYRES)
        if not limit.isdigit() or int(limit) < 1:
            raise CheckpointError(
                f"vision_aspect_ratio {config.vision_aspect_ratio!r} is not supported; expected {_ANYRES}9 or the like"
            )
        return super().layout_settings(config) | {"max_tiles": int(limit)}

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower, projector and packing; see `Family.vision_encoder`."""
        return MixedVision(model.model, *selection(model.config))
