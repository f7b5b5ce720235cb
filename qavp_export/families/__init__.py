"""Model families that can be exported, found by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qavp_export.errors import CheckpointError
from qavp_export.families.base import Family, GraphInput, Layout, Plan
from qavp_export.families.gemma3 import Gemma3
from qavp_export.families.idefics3 import Idefics3, SmolVLM
from qavp_export.families.internvl import InternVL
from qavp_export.families.llava import Llava
from qavp_export.families.llava_next import LlavaNext
from qavp_export.families.llava_onevision import LlavaOnevision
from qavp_export.families.mistral3 import Mistral3, Pixtral
from qavp_export.families.paligemma import PaliGemma
from qavp_export.families.vipllava import VipLlava

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Llava(),
            LlavaNext(),
            LlavaOnevision(),
            VipLlava(),
            InternVL(),
            Idefics3(),
            SmolVLM(),
            Gemma3(),
            PaliGemma(),
            Pixtral(),
            Mistral3(),
        )
    }
)

__all__ = ["FAMILIES", "Family", "GraphInput", "Layout", "Plan", "family_for", "family_of"]


def family_for(model_type: str | None) -> Family:
    """Returns the family of a `model_type`.

    Raises:
        CheckpointError: No family supports it; the message names those that exist.
    """
    if model_type is None or model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"model_type {model_type!r} in config.json is not supported; supported: {supported}")
    return FAMILIES[model_type]


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json: that of its `model_type`, but for LLaVA with a Pixtral tower.

    Raises:
        CheckpointError: No family supports it.
    """
    model_type, vision = config.get("model_type"), config.get("vision_config")
    if model_type == "llava" and isinstance(vision, Mapping) and vision.get("model_type") == Pixtral.model_type:
        return FAMILIES[Pixtral.model_type]
    return family_for(model_type)
