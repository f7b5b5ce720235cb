"""VipLLaVA: LLaVA with a projector that reads several layers of the vision tower."""

from __future__ import annotations

from typing import Any

from torch import nn

from qavp_export.families.base import Family, Plan, decoder_sizes
from qavp_export.families.llava import Llava, LlavaVision, QuestionVision, feature_layers


class VipLlava(Family):
    """`model_type: vipllava`."""

    model_type = "vipllava"
    description = "VipLLaVA (CLIP tower read at several layers, MLP projector, Llama decoder)"
    scorers = ("cls", "received", "norm", "random", "text")
    renames = Llava.renames

    def plan(self, config: Any) -> Plan:
        """Returns the sizes of a VipLLaVA model; see `Family.plan`."""
        vision = config.vision_config
        side, patch = int(vision.image_size), int(vision.patch_size)
        has_cls = vision.model_type == "clip_vision_model"
        # The first token is dropped whatever it is.
        tokens = (side // patch) ** 2 + int(has_cls) - 1
        return Plan(
            image_size=(side, side),
            vision_tokens=tokens,
            image_token_id=int(config.image_token_id),
            has_cls_token=has_cls,
            **decoder_sizes(config.text_config),
        )

    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns tower and projector; see `Family.vision_encoder`."""
        return LlavaVision(model.model, feature_layers(model.config), drop_first=True)

    def question_encoder(self, model: Any, clip: Any) -> nn.Module:
        """Returns tower, projector and the comparison with a question; see `Family.question_encoder`."""
        return QuestionVision(model.model, feature_layers(model.config), True, clip)
