"""Recipes and how they settle on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qavp_export.errors import RecipeError
from qavp_export.families import FAMILIES, Plan
from qavp_export.recipe import DEFAULT_PRESET, PRESETS, Recipe, describe_fields, make_recipe, read_preset
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


# decoder, lm_head, rotation, algorithm, size budget: what the README's table and `--list-recipes` promise.
PROMISED = {
    "rtn": ("w4a4", "w8a16", "none", "rtn", None),
    "rotate": ("w4a4", "w8a16", "hadamard", "sink", None),
    "gptq": ("w4a4", "w8a16", "hadamard", "gptq", None),
    "auto": ("w4a4", "w8a16", "hadamard", "gptq", 0.05),
    "w4a8": ("w4a8", "w8a16", "hadamard", "sink", None),
    "w4a16": ("w4a16", "w8a16", "hadamard", "sink", None),
    "w8a8": ("w8a8", "w8a16", "hadamard", "rtn", None),
    "nvfp4": ("w4a4", "w8a16", "none", "rtn", None),
    "none": ("float", "float", "none", "rtn", None),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_what_they_promise(preset: str) -> None:
    recipe = make_recipe(preset, {})
    assert recipe.name == preset
    actual = (recipe.decoder, recipe.lm_head, recipe.rotation, recipe.algorithm, recipe.size_budget)
    assert actual == PROMISED[preset]
    assert recipe.needs_calibration == (preset in ("gptq", "auto"))
    # Weights are clipped where that lowers their error, unless the user says otherwise.
    assert recipe.clip_search
    assert not make_recipe(preset, {"clip_search": False}).clip_search
    description = read_preset(preset)["description"]
    assert isinstance(description, str)
    assert len(description) < 100


def test_the_default_is_rotate() -> None:
    assert DEFAULT_PRESET == "rotate"
    # Fields that no preset sets have the same default everywhere.
    assert make_recipe("rotate", {}) == Recipe()


def test_every_field_is_documented() -> None:
    described = describe_fields()
    assert described.keys() == Recipe.model_fields.keys()
    for name, field in described.items():
        assert len(field["meaning"]) > 20, name
    assert described["keep"]["default"] == 0.125
    assert described["keep_precision"]["default"] == {}


def _file(folder: Path, text: str | bytes, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_recipe_file_is_a_preset_of_ones_own(tmp_path: Path) -> None:
    text = """
        description: what my team uses
        decoder: w4a8
        keep: 0.25
        keep_precision:
          layers.0.mlp.down_proj: w8a8
          "*.o_proj": float
    """
    path = _file(tmp_path, text.replace("\n        ", "\n"))
    recipe = make_recipe(path, {"keep": 0.5, "seed": None})
    # What is given on the command line wins; None is not given.
    assert (recipe.name, recipe.decoder, recipe.keep, recipe.seed) == ("mine", "w4a8", 0.5, 0)
    # In order: the first match wins.
    assert list(recipe.keep_precision.items()) == [("layers.0.mlp.down_proj", "w8a8"), ("*.o_proj", "float")]
    assert make_recipe(_file(tmp_path, "name: shared\nalpha: 1", "x.yml"), {}).name == "shared"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keeep: 0.5", "keeep = 0.5 is not valid: extra inputs are not permitted"),
        ("keep: much", "keep = 'much' is not valid: input should be a valid number"),
        ("name: [1]", "name = [1] is not valid: input should be a valid string"),
        ("1: 2", "1 = 1 is not valid: keys should be strings"),
        ("keep_precision: {q_proj: w3a3}", "keep_precision.q_proj = 'w3a3' is not valid: input should be 'w4a4'"),
        ("keep_precision: [q_proj]", "keep_precision = ['q_proj'] is not valid"),
        ("", "is not a mapping of fields; see qavp-export --list-recipes"),
        ("- keep", "is not a mapping of fields"),
        ("keep: [", "is not valid YAML"),
        ("keep: 1\n---\nkeep: 0.5", "is not valid YAML (expected a single document"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML (could not determine a constructor"),
        ("keep: 2026-13-01", "is not valid YAML (month must be in 1..12)"),
        (f"seed: {'9' * 5000}", "is not valid YAML (Exceeds the limit"),
        ("[" * 1200, "is not valid YAML (maximum recursion depth exceeded"),
        (b"keep: \xff", "cannot be read ('utf-8' codec"),
        ("#" * 1_000_001, "is larger than 1000000 bytes; that is no recipe"),
    ],
)
def test_a_bad_recipe_file_is_one_clear_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(_file(tmp_path, text), {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alpha_is_a_number_or_auto() -> None:
    # As the command line hands it over.
    assert make_recipe("rtn", {"alpha": "0.25"}).alpha == 0.25
    recipe = make_recipe("rtn", {"alpha": "auto", "select": "dpp"})
    assert (recipe.alpha, recipe.outlier_weight) == ("auto", 0.5)
    assert (recipe.fits_alpha, recipe.needs_calibration, recipe.calibrates_decoder) == (True, True, False)
    recipe = make_recipe("gptq", {"outlier_weight": 0.0})
    assert (recipe.fits_alpha, recipe.needs_calibration, recipe.calibrates_decoder) == (False, True, True)


@pytest.mark.parametrize("name", ["absent.yaml", "folder.yaml"])
def test_a_recipe_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=rf"{name} cannot be read .*; check the path"):
        make_recipe(str(tmp_path / name), {})


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("gptq", {"decoder": "w8a8"}, "algorithm gptq rounds 4-bit weights"),
        ("gptq", {"decoder": "float"}, "algorithm gptq rounds 4-bit weights"),
        ("w8a8", {"size_budget": 0.1}, "size_budget raises 4-bit layers"),
        ("none", {"size_budget": 0.1}, "size_budget raises 4-bit layers"),
        ("w4a8", {"format": "nvfp4"}, "format nvfp4 goes with decoder w4a4"),
        ("gptq", {"format": "nvfp4"}, "format nvfp4 goes with decoder w4a4"),
        ("rotate", {"format": "nvfp4", "size_budget": 0.1}, "format nvfp4 goes with decoder w4a4"),
        ("nvfp4", {"alpha": "auto"}, "format nvfp4 goes with decoder w4a4, no GPTQ, no size_budget and no alpha auto"),
        ("rotate", {"alpha": "auto", "select": "maxmin"}, "alpha auto weighs scores, and select maxmin ignores them"),
        ("rotate", {"alpha": "auto", "keep_range": (0.1, 0.5)}, "alpha auto fits one share of tokens"),
        ("rotate", {"alpha": "auto", "outlier_weight": 0.5}, "alpha auto chooses outlier_weight too"),
    ],
)
def test_contradictions_are_refused(preset: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(preset, overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"keep": 0.0}, "keep = 0.0 is not valid: input should be greater than 0"),
        ({"keep": -0.1}, "keep = -0.1"),
        ({"keep": 1.0001}, "keep = 1.0001 is not valid: input should be less than or equal to 1"),
        ({"keep": float("nan")}, "keep = nan"),
        ({"alpha": 1.5}, "alpha = 1.5 is not valid: give a number in [0, 1], or auto"),
        ({"alpha": float("nan")}, "alpha = nan is not valid: give a number in [0, 1], or auto"),
        ({"alpha": "best"}, "alpha = 'best' is not valid: give a number in [0, 1], or auto"),
        ({"outlier_weight": -0.5}, "outlier_weight = -0.5 is not valid: input should be greater than or equal to 0"),
        ({"semantic": "vibes"}, "semantic = 'vibes'"),
        ({"score_input": "log"}, "score_input = 'log'"),
        ({"group_size": 0}, "group_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"damping": 0.0}, "damping = 0.0 is not valid: input should be greater than 0"),
        ({"size_budget": 1.5}, "size_budget = 1.5"),
        ({"calibration_samples": 0}, "calibration_samples = 0"),
        ({"scales": "three-level"}, "scales = 'three-level'"),
        ({"rotation": "givens"}, "rotation = 'givens'"),
        ({"keeep": 0.5}, "keeep = 0.5 is not valid: extra inputs"),
        ({"keep_range": (0.5, 0.2)}, "keep_range = (0.5, 0.2) is not valid: give two ascending fractions in (0, 1]"),
        ({"keep_range": (0.3, 0.3)}, "keep_range = (0.3, 0.3) is not valid: give two ascending fractions"),
        ({"keep_range": (0.0, 0.5)}, "keep_range = (0.0, 0.5) is not valid: give two ascending fractions"),
        ({"keep_range": (0.5, 1.5)}, "keep_range = (0.5, 1.5) is not valid: give two ascending fractions"),
        ({"keep_range": (0.5, float("nan"))}, "keep_range = (0.5, nan) is not valid: give two ascending fractions"),
        ({"keep_range": "wide"}, "keep_range = 'wide' is not valid"),
        ({"keep_range": (0.2, 0.5), "keep": 0.1}, "keep 0.1 is outside keep_range 0.2 to 0.5"),
    ],
)
def test_wrong_values_name_the_field(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe("rtn", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "keep"),
    [({"keep_range": (0.05, 0.5)}, 0.125), ({"keep_range": [0.2, 0.5]}, 0.2), ({"keep_range": (0.01, 0.1)}, 0.1)],
)
def test_a_range_leaves_k_open_and_the_default_lies_within(overrides: dict[str, Any], keep: float) -> None:
    recipe = make_recipe("rtn", overrides)
    assert recipe.keep == keep
    settings = settle(recipe, LLAVA, _plan())
    assert (settings.tokens_kept, settings.pruned) == (None, True)


def test_k_is_open_where_the_number_of_tokens_varies() -> None:
    open_plan = _plan(vision_tokens=None)
    settings = settle(make_recipe("rtn", {"keep": 0.3}), LLAVA, open_plan)
    assert (settings.tokens_kept, settings.pruned) == (None, True)
    settings = settle(make_recipe("rtn", {"keep": 1.0}), LLAVA, open_plan)
    assert (settings.tokens_kept, settings.pruned) == (None, False)


@pytest.mark.parametrize(("keep", "pruned"), [(1.0, False), (0.9999, False), (0.99, True)])
def test_keeping_every_token_is_no_pruning(keep: float, pruned: bool) -> None:
    # 0.9999 of 576 tokens is 575.9, which rounds to all of them.
    assert settle(make_recipe("rtn", {"keep": keep}), LLAVA, _plan()).pruned == pruned


def test_how_much_is_kept_is_one_choice(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("keep_range: [0.1, 0.4]\nkeep: 0.3\n", encoding="utf-8")
    assert (make_recipe(str(path), {}).keep, make_recipe(str(path), {}).keep_range) == (0.3, (0.1, 0.4))
    assert make_recipe(str(path), {"keep": 0.5}).keep_range is None
    assert make_recipe(str(path), {"keep_range": (0.05, 0.2)}).keep == 0.125


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'gptq9'; choose one of rtn, .*, none, or give a \.yaml"):
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
