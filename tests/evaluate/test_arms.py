"""Arms: names to recipes."""

from __future__ import annotations

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
