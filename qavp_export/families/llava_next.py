"""LLaVA-NeXT (LLaVA-1.6): tiles of any resolution, packed into one sequence per image."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qavp_export.errors import CheckpointError
from qavp_export.families.base import GraphInput, Plan
from qavp_export.families.llava import Llava, LlavaVision, selection
from qavp_export.numerics.semantic import Scorer
from qavp_export.runtime.tiles import count_tiles, pack_tiles

# Sample sizes, different from each other.
TILES, TOKENS = 3, 7


class PackedVision(LlavaVision):
    """Tower and projector over the tiles of one image, whose tokens are then packed into one sequence.

    Which token stands where depends on the image's size; the caller works it out (`runtime.tiles.pack_tiles`). Row i of
    the flattened tile tokens is token i % N of tile i // N; the row behind the last is the learned newline.
    """

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, token_indices: Tensor, patch_relevance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns `image_features [1,M,D]` and `token_relevance [1,M]`.

        Args:
            pixel_values: `[T,3,H,W]`, the tiles of one image.
            token_indices: `[M]` int64, rows of the flattened tile tokens.
            patch_relevance: `[T,N]` f32.
        """
        rows, relevance = self.rows(pixel_values, patch_relevance)
        return rows[token_indices].unsqueeze(0), relevance[token_indices].unsqueeze(0)

    def rows(self, pixel_values: Tensor, patch_relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the flattened tile tokens with the newline behind them, `[T*N+1,D]`, and their relevance."""
        tokens = torch.cat([super().forward(pixel_values).flatten(0, 1), self.model.image_newline.unsqueeze(0)])
        return tokens, torch.cat([patch_relevance.flatten(), patch_relevance.new_zeros(1)])


class LlavaNext(Llava):
    """`model_type: llava_next`."""

    model_type = "llava_next"
    description = "LLaVA-NeXT, LLaVA-1.6 (CLIP tower, tiles of any resolution, Llama / Mistral / Qwen2 decoder)"
    layout = "tiles"
    scorers: ClassVar[tuple[Scorer, ...]] = ("cls", "received", "norm", "random")
    renames = (*Llava.renames, (r"^image_newline$", "model.image_newline"))

    def plan(self, config: Any) -> Plan:
        """Returns the sizes; see `Family.plan`."""
        plan = super().plan(config)
        if plan.vision_tokens != _patches(config) ** 2:
            raise CheckpointError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} gives {plan.vision_tokens} "
                f"tokens per tile, which are no grid of {_patches(config)} x {_patches(config)} patches; use 'default' "
                "for a vision tower with a [CLS] token and 'full' for one without"
            )
        return dataclasses.replace(plan, vision_tokens=None, tower_patches=plan.vision_tokens)

    def vision_inputs(self, plan: Plan) -> tuple[GraphInput, ...]:
        """Returns the tiles of one image and how their tokens are packed; see `Family.vision_inputs`."""
        if plan.image_size is None:
            raise ValueError("the tiles of LLaVA-NeXT have one size")
        height, width = plan.image_size
        return (
            GraphInput("pixel_values", torch.float32, ("tiles", 3, height, width), (TILES, 3, height, width)),
            GraphInput("token_indices", torch.int64, ("tokens",), (TOKENS,)),
        )

    def layout_settings(self, config: Any) -> dict[str, Any]:
        """Returns what `runtime.tiles.pack_tiles` needs; see `Family.layout_settings`."""
        return {
            "grid_pinpoints": [[int(height), int(width)] for height, width in config.image_grid_pinpoints],
            "tile_size": int(config.vision_config.image_size),
            "tile_patches": _patches(config),
            "max_tiles": None,
        }

    def random_images(
        self, config: Any, plan: Plan, rng: np.random.Generator, *, pruned: bool
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Draws two images of the same odd size that make few tiles; see `Family.random_images`."""
        del plan
        settings = self.layout_settings(config)
        rows, columns = min(settings["grid_pinpoints"], key=lambda pinpoint: (pinpoint[0] * pinpoint[1], *pinpoint))
        # A little narrower than its grid, so that there is padding to cut off.
        size = (rows, columns - columns // 7)
        packed = pack_tiles(size, settings, newlines=not pruned)
        shape = (count_tiles(size, settings), 3, settings["tile_size"], settings["tile_size"])
        relevance = {"patch_relevance": np.zeros((shape[0], settings["tile_patches"] ** 2), np.float32)}
        images = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
        return [{"pixel_values": pixels, **packed, **relevance} for pixels in images]

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower, projector and packing; see `Family.vision_encoder`."""
        return PackedVision(model.model, *selection(model.config))


def _patches(config: Any) -> int:
    return int(config.vision_config.image_size) // int(config.vision_config.patch_size)
