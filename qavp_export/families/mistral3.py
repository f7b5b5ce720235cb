"""Mistral 3 and Pixtral: images in their own resolution, a tower with 2-D rotary positions, a Mistral decoder."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qavp_export.errors import CheckpointError
from qavp_export.families.base import GraphInput, Plan, decoder_sizes
from qavp_export.families.llava import Llava, feature_layers
from qavp_export.numerics.semantic import Scorer

# Rows and columns of tokens to trace with, and to draw images of: turned, an image has as many tokens.
_GRID = (3, 5)


class PixtralVision(nn.Module):
    """Pixtral tower and projector for one image, whose patches all attend to one another: no mask."""

    model: Any

    def __init__(self, model: nn.Module, layers: list[int]) -> None:
        """Wraps a `LlavaModel`.

        Args:
            model: A `LlavaModel` or `Mistral3Model` with a Pixtral tower.
            layers: Indices into the tower's hidden states; several are concatenated.
        """
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns `image_features [1,N,D]` for `pixel_values [1,3,H,W]`."""
        features: Tensor = self.model.multi_modal_projector(self.encode(pixel_values)[0])
        return features

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, int, int]:
        """Returns the tower's states `[1,P,C]`, and the rows and columns of its patches."""
        tower = self.model.vision_tower
        grid = tower.patch_conv(pixel_values)
        rows, columns = grid.shape[2:]
        state = tower.ln_pre(grid.flatten(2).transpose(1, 2))
        places = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions = torch.stack([place.flatten() for place in places], dim=-1)
        angles = tower.patch_positional_embedding(state, positions)
        states = [state]
        for layer in tower.transformer.layers:
            states.append(layer(states[-1], None, position_embeddings=angles))
        return torch.cat([states[index] for index in self.layers], dim=-1), rows, columns


class Mistral3Vision(PixtralVision):
    """As `PixtralVision`, with squares of patches merged to tokens."""

    def forward(self, pixel_values: Tensor, patch_relevance: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns `image_features [1,N,D]` and `token_relevance [1,N]`.

        Args:
            pixel_values: `[1,3,H,W]`.
            patch_relevance: `[1,P]` f32.
        """
        projector = self.model.multi_modal_projector
        states, rows, columns = self.encode(pixel_values)
        patches = _squares(rows, columns, projector.patch_merger.spatial_merge_size)
        # Channel by channel, as torch's unfold orders them.
        merged = projector.norm(states)[:, patches].transpose(2, 3).flatten(2)
        tokens = projector.act(projector.linear_1(projector.patch_merger.merging_layer(merged)))
        return projector.linear_2(tokens), patch_relevance[:, patches].mean(-1)


def _squares(rows: int, columns: int, side: int) -> Tensor:
    """The patches of each token, both in raster order `[N,side*side]`; what fills no square is left out."""
    tops = torch.arange(rows // side) * side
    lefts = torch.arange(columns // side) * side
    corners = (tops.unsqueeze(1) * columns + lefts).flatten()
    within = torch.arange(side)
    return corners.unsqueeze(1) + (within.unsqueeze(1) * columns + within).flatten()


class Pixtral(Llava):
    """`model_type: llava` with a vision tower of `model_type: pixtral`."""

    model_type = "pixtral"
    description = "Pixtral (model_type llava; Pixtral tower, images in their own resolution, Mistral decoder)"
    layout = "native"
    row_break_token = "[IMG_BREAK]"
    scorers: ClassVar[tuple[Scorer, ...]] = ("received", "norm", "random")

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of a Pixtral model; see `Family.plan`."""
        if config.vision_feature_select_strategy != "full":
            raise CheckpointError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} in config.json would drop "
                "an image's first patch: a Pixtral tower has no [CLS] token; set it to 'full'"
            )
        return self._plan(config, 1)

    def _plan(self, config: Any, merge: int) -> Plan:
        return Plan(
            image_size=None,
            vision_tokens=None,
            patch_size=int(config.vision_config.patch_size),
            merge_size=merge,
            image_token_id=int(config.image_token_id),
            has_cls_token=False,
            **decoder_sizes(config.text_config),
        )

    def vision_inputs(self, plan: Plan) -> tuple[GraphInput, ...]:
        """Returns one image of any size; see `Family.vision_inputs`."""
        height, width = _size(plan)
        return (GraphInput("pixel_values", torch.float32, (1, 3, "height", "width"), (1, 3, height, width)),)

    def layout_settings(self, config: Any) -> dict[str, Any]:
        """Returns how many pixels make a token; see `Family.layout_settings`."""
        plan = self.plan(config)
        return {"patch_size": plan.patch_size, "spatial_merge_size": plan.merge_size}

    def random_images(
        self, config: Any, plan: Plan, rng: np.random.Generator, *, pruned: bool
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Draws an image that is wide and one that is high; see `Family.random_images`."""
        del config, pruned
        height, width = _size(plan)
        relevance = self.relevance_input(plan)
        more = {} if relevance is None else {relevance.name: np.zeros(relevance.sample, np.float32)}
        return [
            {"pixel_values": rng.standard_normal((1, 3, *size)).astype(np.float32), **more}
            for size in ((height, width), (width, height))
        ]

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower and projector; see `Family.vision_encoder`."""
        return PixtralVision(model.model, feature_layers(model.config))


class Mistral3(Pixtral):
    """`model_type: mistral3`."""

    model_type = "mistral3"
    description = "Mistral Small 3.1 and 3.2, Ministral 3 (Pixtral tower, merged patches, Mistral / Ministral decoder)"

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of a Mistral 3 model; see `Family.plan`."""
        if len(feature_layers(config)) != 1:
            raise CheckpointError(
                f"config.json names vision_feature_layer {config.vision_feature_layer}, and the projector of Mistral 3 "
                "reads one; set it to one layer"
            )
        return self._plan(config, int(config.spatial_merge_size))

    def relevance_input(self, plan: Plan) -> GraphInput:
        """Returns the relevance of one image's patches; see `Family.relevance_input`."""
        patches = _GRID[0] * _GRID[1] * plan.merge_size**2
        return GraphInput("patch_relevance", torch.float32, (1, "patches"), (1, patches))

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower, merger and projector; see `Family.vision_encoder`."""
        return Mistral3Vision(model.model, feature_layers(model.config))


def _size(plan: Plan) -> tuple[int, int]:
    """Height and width of an image of `_GRID` tokens."""
    if plan.patch_size is None:
        raise ValueError("a Pixtral tower has a patch size")
    cell = plan.patch_size * plan.merge_size
    return _GRID[0] * cell, _GRID[1] * cell
