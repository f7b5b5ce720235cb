"""Recipes and how they settle on a model."""

from __future__ import annotations

from typing import Any

import pytest

from qavp_export.errors import RecipeError
from qavp_export.families import FAMILIES, Plan
from qavp_export.recipe import PRESETS, make_recipe
from qavp_export.settings import settle

LLAVA = FAMILIES["llava"]


def _plan(**changes: Any) -> Plan:
    sizes: dict[str, Any] = {
        "image_size": (336, 336),
        "vision_tokens": 576,
        "image_token_id": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 32064,
        "context_length": 4096,
        "has_cls_token": True,
    }
    return Plan(**(sizes | changes))


def test_defaults_are_the_mission() -> None:
    settings = settle(make_recipe("rtn", {}), LLAVA, _plan())
    assert settings.tokens_kept == 72
    assert settings.group_size == 128
    assert settings.semantic == "cls"
    assert settings.recipe.decoder == "w4a4"
    assert settings.recipe.lm_head == "w8a16"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset: str) -> None:
    assert make_recipe(preset, {}).name == preset


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"keep": 0.0}, "keep = 0.0 is not valid: input should be greater than 0"),
        ({"keep": -0.1}, "keep = -0.1"),
        ({"keep": 1.0001}, "keep = 1.0001 is not valid: input should be less than or equal to 1"),
        ({"keep": float("nan")}, "keep = nan"),
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"semantic": "vibes"}, "semantic = 'vibes'"),
        ({"score_input": "log"}, "score_input = 'log'"),
        ({"group_size": 0}, "group_size = 0"),
        ({"keeep": 0.5}, "keeep = 0.5 is not valid: extra inputs"),
    ],
)
def test_wrong_values_name_the_field(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe("rtn", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'gptq9'; choose one of rtn, none"):
        make_recipe("gptq9", {})


def test_group_size_adapts_to_every_channel_count() -> None:
    plan = _plan(hidden_size=576, intermediate_size=1536, num_attention_heads=9, head_dim=64)
    assert settle(make_recipe("rtn", {}), LLAVA, plan).group_size == 64
    # Unquantized, only the score needs a group size: 576 = 9 * 64.
    assert settle(make_recipe("none", {}), LLAVA, plan).group_size == 64


def test_group_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="group_size 96 does not divide the model's 4096 channels"):
        settle(make_recipe("rtn", {"group_size": 96}), LLAVA, _plan())
    with pytest.raises(RecipeError, match="no usable group size"):
        settle(make_recipe("rtn", {}), LLAVA, _plan(hidden_size=4100))


def test_towers_without_cls_score_by_received_attention() -> None:
    plan = _plan(has_cls_token=False)
    assert settle(make_recipe("rtn", {}), LLAVA, plan).semantic == "received"
    with pytest.raises(RecipeError, match=r"needs a vision tower with a \[CLS\] token; use 'received'"):
        settle(make_recipe("rtn", {"semantic": "cls"}), LLAVA, plan)


def test_the_resolved_recipe_says_what_was_chosen() -> None:
    resolved = settle(make_recipe("rtn", {"keep": 0.25}), LLAVA, _plan()).resolved()
    assert (resolved["semantic"], resolved["group_size"], resolved["keep"]) == ("cls", 128, 0.25)
