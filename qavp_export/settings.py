"""Makes the choices that a recipe leaves open, and checks that it fits the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qavp_export.errors import RecipeError
from qavp_export.families import Family, Plan
from qavp_export.numerics.groups import largest_group_size
from qavp_export.numerics.score import PAPER_ALPHA
from qavp_export.numerics.select import tokens_to_keep
from qavp_export.numerics.semantic import Scorer
from qavp_export.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """A recipe with every choice made.

    Attributes:
        recipe: The recipe.
        semantic: The scorer, chosen.
        alpha: Weight of semantic relevance; the paper's until a fit has chosen another.
        outlier_weight: Weight of outlier intensity, likewise.
        group_size: Channels that share a scale, in the score and in the decoder.
        tokens_kept: Vision tokens kept per unit (k); None if it varies with the image or is chosen by the call.
        pruned: Whether tokens may be left out.
    """

    recipe: Recipe
    semantic: Scorer
    alpha: float
    outlier_weight: float
    group_size: int
    tokens_kept: int | None
    pruned: bool

    @property
    def reads_question(self) -> bool:
        """Whether the vision encoder takes the question as an input."""
        return self.pruned and self.semantic == "text"

    def resolved(self) -> dict[str, Any]:
        """Returns the recipe's fields with the choices filled in, as the manifest stores them."""
        chosen = {"alpha": self.alpha, "outlier_weight": self.outlier_weight}
        return self.recipe.model_dump() | chosen | {"semantic": self.semantic, "group_size": self.group_size}


def settle(recipe: Recipe, family: Family, plan: Plan) -> Settings:
    """Fills in a recipe for a model; reads no weight.

    Raises:
        RecipeError: The recipe does not fit: a scorer that the model cannot serve, a group size that does not divide
            its channels, weights to be fitted where all tokens are kept.
    """
    semantic = choose_scorer(recipe, family, plan)
    tokens_kept, pruned = None, recipe.keep < 1 or recipe.keep_range is not None
    if plan.vision_tokens is not None and recipe.keep_range is None:
        tokens_kept = tokens_to_keep(plan.vision_tokens, recipe.keep)
        pruned = tokens_kept < plan.vision_tokens
    if recipe.fits_alpha and not pruned:
        raise RecipeError(f"alpha auto chooses which tokens are kept, and keep {recipe.keep:g} keeps all; set no alpha")
    alpha = PAPER_ALPHA if recipe.alpha == "auto" else recipe.alpha
    group_size = _group_size(recipe, plan)
    return Settings(recipe, semantic, alpha, recipe.outlier_weight, group_size, tokens_kept, pruned)


def choose_scorer(recipe: Recipe, family: Family, plan: Plan) -> Scorer:
    """Returns the semantic scorer of a recipe on a model.

    Raises:
        RecipeError: The model cannot serve it.
    """
    semantic: Scorer = recipe.semantic or family.scorers[0]
    if semantic not in family.scorers:
        reason = ", which has no CLIP tower that sees an image as one tile" if semantic == "text" else ""
        raise RecipeError(
            f"semantic {semantic!r} is not available for {family.model_type}{reason}: use {_listed(family.scorers)}"
        )
    if semantic == "cls" and not plan.has_cls_token:
        if recipe.semantic is not None:
            raise RecipeError("semantic 'cls' needs a vision tower with a [CLS] token; use 'received'")
        semantic = "received"
    return semantic


def _group_size(recipe: Recipe, plan: Plan) -> int:
    rotated = recipe.rotation != "none"
    precisions = {recipe.decoder, *recipe.keep_precision.values()}
    pruned = recipe.keep < 1 or recipe.keep_range is not None
    channels = {plan.hidden_size} if pruned or recipe.lm_head != "float" or rotated else set()
    if rotated or precisions != {"float"}:
        channels |= {plan.hidden_size, plan.intermediate_size, plan.num_attention_heads * plan.head_dim}
    if recipe.group_size is None:
        return largest_group_size(channels)
    for count in sorted(channels):
        if count % recipe.group_size:
            raise RecipeError(
                f"group_size {recipe.group_size} does not divide the model's {count} channels; "
                "leave it out to have one chosen"
            )
    return recipe.group_size


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
