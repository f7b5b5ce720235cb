"""LLaVA-1.5: a CLIP-like vision tower, a two-layer projector and a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qavp_export.families.base import Family, Plan, decoder_sizes
from qavp_export.families.question import QuestionRelevance
from qavp_export.numerics.semantic import Scorer


class LlavaVision(nn.Module):
    """Vision tower and projector of LLaVA, for one resolution and a batch of images."""

    model: Any

    def __init__(self, model: nn.Module, layers: list[int], drop_first: bool) -> None:
        """Wraps a `LlavaModel`.

        Args:
            model: The `LlavaModel`; its own `get_image_features` splits the batch, so its parts are called instead.
            layers: Indices into the tower's hidden states; several are concatenated.
            drop_first: Whether the first token ([CLS]) is dropped.
        """
        super().__init__()
        self.model = model
        self.layers = layers
        self.drop_first = drop_first

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns `image_features [B,N,D]` for `pixel_values [B,3,H,W]`."""
        return self.project(self.states(pixel_values))

    def states(self, pixel_values: Tensor) -> list[tuple[int, Tensor]]:
        """Returns the patches' hidden states `[B,N,C]` that feed the projector, each with the number of its layer."""
        states = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        start = 1 if self.drop_first else 0
        return [(layer % len(states), states[layer][:, start:]) for layer in self.layers]

    def project(self, states: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Returns `image_features` for what `states` returned."""
        features: Tensor = self.model.multi_modal_projector(torch.cat([state for _, state in states], dim=-1))
        return features


class QuestionVision(LlavaVision):
    """The same for a batch of images with one question each."""

    def __init__(self, model: nn.Module, layers: list[int], drop_first: bool, clip: nn.Module) -> None:
        """Wraps a `LlavaModel` and the `CLIPModel` that its vision tower comes from; see `LlavaVision`."""
        super().__init__(model, layers, drop_first)
        self.question = QuestionRelevance(clip)

    def forward(self, pixel_values: Tensor, text_input_ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns `image_features [B,N,D]` and `token_relevance [B,N]`.

        Of several layers that feed the projector, the last is compared with the question.

        Args:
            pixel_values: `[B,3,H,W]`.
            text_input_ids: `[B,L]` int64, see `Family.question_input`.
        """
        states = self.states(pixel_values)
        _, last = max(states, key=itemgetter(0))
        return self.project(states), self.question(last, text_input_ids)


class Llava(Family):
    """`model_type: llava`."""

    model_type = "llava"
    description = "LLaVA-1.5 (CLIP tower, MLP projector, Llama / Mistral / Qwen2 decoder)"
    scorers: ClassVar[tuple[Scorer, ...]] = ("cls", "received", "norm", "random", "text")
    renames: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^model\.language_model\.model\.", "model.language_model."),
        (r"^model\.language_model\.lm_head\.", "lm_head."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    )

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of a LLaVA model; see `Family.plan`."""
        vision = config.vision_config
        side, patch = int(vision.image_size), int(vision.patch_size)
        has_cls = vision.model_type == "clip_vision_model"
        drop_first = config.vision_feature_select_strategy == "default"
        # The patch convolution drops what is left of an image that is not a multiple of the patch size.
        tokens = (side // patch) ** 2 + int(has_cls) - int(drop_first)
        return Plan(
            image_size=(side, side),
            vision_tokens=tokens,
            image_token_id=int(config.image_token_id),
            has_cls_token=has_cls and drop_first,
            **decoder_sizes(config.text_config),
        )

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower and projector; see `Family.vision_encoder`."""
        return LlavaVision(model.model, *selection(model.config))

    def question_encoder(self, model: Any, clip: Any) -> nn.Module:
        """Returns tower, projector and the comparison with a question; see `Family.question_encoder`."""
        return QuestionVision(model.model, *selection(model.config), clip)


def feature_layers(config: Any) -> list[int]:
    """Returns which hidden states of the vision tower feed the projector."""
    layer = config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)


def selection(config: Any) -> tuple[list[int], bool]:
    """Returns which hidden states feed the projector, and whether their first token is dropped."""
    return feature_layers(config), config.vision_feature_select_strategy == "default"
