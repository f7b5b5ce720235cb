"""Arms: names to recipes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from qavp_export.errors import InputError, RecipeError
from qavp_export.evaluate.arms import ARMS, GROUPS, choose_arms, parse_arm


def test_the_papers_arms() -> None:
    arms = {arm.name: arm.recipes("rtn", 0.25, 7) for arm in choose_arms(["paper"])}
    assert list(arms) == ["full", "w4a4", "full+semantic", "w4a4+semantic", "w4a4+hybrid", "w4a4+random"]
    seen = {
        name: (recipes[0].decoder, recipes[0].keep, recipes[0].alpha, recipes[0].select)
        for name, recipes in arms.items()
        if recipes[0].keep < 1
    }
    assert seen == {
        "full+semantic": ("float", 0.25, 1.0, "topk"),
        "w4a4+semantic": ("w4a4", 0.25, 1.0, "topk"),
        "w4a4+hybrid": ("w4a4", 0.25, 0.5, "topk"),
        "w4a4+random": ("w4a4", 0.25, 1.0, "topk"),
    }
    assert [(arms[name][0].decoder, arms[name][0].keep) for name in ("full", "w4a4")] == [("float", 1), ("w4a4", 1)]
    assert [(recipe.semantic, recipe.seed) for recipe in arms["w4a4+random"]] == [("random", s) for s in range(7, 12)]
    assert {recipe.seed for name, recipes in arms.items() if name != "w4a4+random" for recipe in recipes} == {7}


def test_every_selector_is_an_arm_and_every_arm_a_recipe() -> None:
    selected = {recipe.select for arm in choose_arms(["selectors"]) for recipe in arm.recipes("rotate", 0.125, 0)}
    assert selected == {"topk", "dpp", "maxmin"}
    assert {name for names in GROUPS.values() for name in names} == set(ARMS)
    assert all(arm.recipes("rotate", 0.125, 0) for arm in choose_arms(["all"]))


def test_every_scorer_is_an_arm_under_every_rule_that_reads_scores() -> None:
    arms = choose_arms(["scorers"])
    assert all(arm.optional for arm in arms)
    crossed = Counter(
        (recipe.select, recipe.semantic, recipe.alpha, recipe.score_input)
        for arm in arms
        for recipe in arm.recipes("rotate", 0.125, 0)
    )
    expected = {
        (select, scorer, alpha, "raw"): 1
        for select in ("topk", "dpp")
        for scorer in ("cls", "received", "norm", "text")
        for alpha in (1.0, 0.5)
    }
    # The family's scorer with each part of the hybrid by itself; controls, a draw for each of five seeds.
    for select in ("topk", "dpp"):
        expected |= {(select, None, 0.5, "rms"): 1, (select, None, 0.0, "raw"): 1, (select, "random", 1.0, "raw"): 5}
    assert crossed == expected
    assert {recipe.decoder for arm in arms for recipe in arm.recipes("rotate", 0.125, 0)} == {"w4a4"}


def test_only_what_a_group_asks_for_may_be_left_out() -> None:
    for names in (["w4a4+cls", "scorers"], ["scorers", "w4a4+cls"]):
        required = [arm.name for arm in choose_arms(names, ["mine=rtn"]) if not arm.optional]
        assert required == ["w4a4+cls", "mine"]


def test_a_recipe_that_fits_alpha_goes_with_every_arm(tmp_path: Path) -> None:
    path = tmp_path / "fitted.yaml"
    path.write_text("alpha: auto\n", encoding="utf-8")
    for arm in choose_arms(["all"]):
        assert all(not recipe.fits_alpha for recipe in arm.recipes(str(path), 0.125, 0))
    (arm,) = choose_arms([], [f"mine={path}"])
    assert arm.recipes("rotate", 0.125, 0)[0].fits_alpha


def test_an_arm_named_twice_comes_once() -> None:
    names = [arm.name for arm in choose_arms(["w4a4+dpp", "selectors", "full"])]
    assert names == ["w4a4+dpp", "w4a4+hybrid", "w4a4+dpp-semantic", "w4a4+maxmin", "full"]


def test_an_arm_of_ones_own() -> None:
    (arm,) = choose_arms([], ["mine=w4a8,score_input=rms,keep=0.5,alpha=0.25"])
    (recipe,) = arm.recipes("rotate", 0.125, 3)
    found = (arm.name, recipe.name, recipe.score_input, recipe.keep, recipe.alpha, recipe.seed)
    assert found == ("mine", "w4a8", "rms", 0.5, 0.25, 3)


@pytest.mark.parametrize("text", ["mine", "=rtn", "mine=", "mine=rtn,alpha", "mine=rtn,=1", "mine=rtn,alpha=[1"])
def test_what_is_no_arm(text: str) -> None:
    with pytest.raises(InputError, match="--arm"):
        parse_arm(text)


def test_bad_names_and_fields() -> None:
    with pytest.raises(InputError, match="'none' does not exist; choose from paper"):
        choose_arms(["none"])
    with pytest.raises(InputError, match="two arms 'full'"):
        choose_arms([], ["full=rtn"])
    with pytest.raises(InputError, match="no arm"):
        choose_arms([])
    with pytest.raises(RecipeError, match="alpha"):
        parse_arm("mine=rtn,alpha=2").recipes("rotate", 0.125, 0)
    with pytest.raises(RecipeError, match="unknown recipe"):
        parse_arm("mine=best").recipes("rotate", 0.125, 0)
