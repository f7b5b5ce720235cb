"""The recipe: everything that shapes an export, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qavp_export.errors import RecipeError
from qavp_export.numerics.score import ScoreInput
from qavp_export.numerics.select import Select
from qavp_export.numerics.semantic import Scorer


class Recipe(BaseModel):
    """Everything that shapes the result; the same recipe and checkpoint give byte-identical graphs and weights.

    Attributes:
        name: The preset that the recipe started from.
        keep: Fraction of vision tokens kept, in (0, 1]; k = max(1, floor(keep * N + 0.5)).
        semantic: Semantic scorer; None takes the family's default.
        alpha: Weight of semantic relevance against quantization sensitivity, in [0, 1] (QAPruner, eq. for S).
        score_input: `raw` scores the projected tokens as they are (the paper), `rms` divides each by its root mean
            square first, which is what the decoder's quantizers see.
        select: Selection rule: `topk` takes the k highest scores.
        positions: `contiguous` numbers the shortened prompt 0, 1, 2, ... (the paper); `original` keeps each token's
            position in the unpruned prompt.
        seed: Seed of the `random` scorer.
        group_size: Channels that share a scale, in the score and in the decoder; None takes the largest of 128,
            64, 32, 16 that divides every channel count.
        decoder: Precision of the decoder's linear layers: `w4a4` (two-level 4-bit weights and activations) or `float`.
        lm_head: Precision of the output projection: `w8a16` (8-bit weights, float activations) or `float`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "rtn"
    keep: float = Field(default=0.125, gt=0, le=1)
    semantic: Scorer | None = None
    alpha: float = Field(default=0.5, ge=0, le=1)
    score_input: ScoreInput = "raw"
    select: Select = "topk"
    positions: Literal["contiguous", "original"] = "contiguous"
    seed: int = Field(default=0, ge=0, lt=2**31)
    group_size: int | None = Field(default=None, ge=8, le=1024)
    decoder: Literal["w4a4", "float"] = "w4a4"
    lm_head: Literal["w8a16", "float"] = "w8a16"


# What each preset sets; a field that it leaves out keeps its default.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "rtn": MappingProxyType({"decoder": "w4a4", "lm_head": "w8a16"}),
        "none": MappingProxyType({"decoder": "float", "lm_head": "float"}),
    }
)


def make_recipe(preset: str, overrides: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from a preset and the fields that the user set.

    Args:
        preset: A key of `PRESETS`.
        overrides: Recipe fields; a None value counts as not set.

    Raises:
        RecipeError: Unknown preset or field, or a value out of range; the message names the first field at fault.
    """
    if preset not in PRESETS:
        raise RecipeError(f"unknown recipe {preset!r}; choose one of {', '.join(PRESETS)}")
    fields = {"name": preset} | dict(PRESETS[preset])
    fields |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise RecipeError(f"{field} = {first['input']!r} is not valid: {message}") from error
