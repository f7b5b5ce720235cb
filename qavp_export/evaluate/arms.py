"""The arms of a comparison: what is exported from the checkpoint, each a preset and recipe fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import yaml

from qavp_export.errors import InputError
from qavp_export.numerics.select import Select
from qavp_export.numerics.semantic import Scorer
from qavp_export.recipe import Recipe, make_recipe

FULL = "full"
"""Full precision with all tokens: the reference of every comparison."""

_RANDOM_SEEDS = 5


@dataclass(frozen=True)
class Arm:
    """One way to export the checkpoint.

    Attributes:
        name: What tables call it.
        preset: A preset or a recipe file; None: that of the quantized arms.
        fields: Recipe fields that differ from the preset.
        pruned: Whether vision tokens are pruned, to the share that the comparison asks for.
        seeds: How many seeds its figures are the mean of.
        optional: Whether it is left out where the checkpoint lacks what it needs: a group asked for it, not its name.
    """

    name: str
    preset: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    pruned: bool = True
    seeds: int = 1
    optional: bool = False

    def recipes(self, quantized: str, keep: float, seed: int) -> list[Recipe]:
        """Returns one recipe for each seed.

        Args:
            quantized: Preset of the arms that name none.
            keep: Share of the vision tokens that pruned arms keep, unless their fields say otherwise.
            seed: The first seed.

        Raises:
            RecipeError: A field is unknown or out of range, or there is no such preset.
        """
        share: dict[str, Any] = {"keep": keep} if self.pruned else {"keep": 1.0, **_UNREAD}
        if "keep_range" in self.fields:
            share = {}
        return [
            make_recipe(self.preset or quantized, share | {"seed": number} | dict(self.fields))
            for number in range(seed, seed + self.seeds)
        ]


# The paper's score is spelled out, so that another default leaves the comparison as it is.
_SEMANTIC: Mapping[str, Any] = MappingProxyType({"alpha": 1.0})
_HYBRID: Mapping[str, Any] = MappingProxyType({"alpha": 0.5, "outlier_weight": 0.5, "score_input": "raw"})
_SENSITIVITY: Mapping[str, Any] = MappingProxyType({"alpha": 0.0, "outlier_weight": 0.5, "score_input": "raw"})
# Where no score is read: a recipe that fits alpha is refused there.
_UNREAD: Mapping[str, Any] = MappingProxyType({"alpha": 1.0})
# Scorers that say something of a token; a hybrid with a draw is no score.
_SCORERS: tuple[Scorer, ...] = ("cls", "received", "norm", "text")


def _select(rule: Select, score: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType({"select": rule, **score})


_RANDOM: Mapping[str, Any] = MappingProxyType({**_SEMANTIC, "semantic": "random"})


def _paper() -> Iterator[Arm]:
    yield Arm(FULL, "none", pruned=False)
    yield Arm("w4a4", None, pruned=False)
    for prefix, preset in (("full", "none"), ("w4a4", None)):
        yield Arm(f"{prefix}+semantic", preset, _select("topk", _SEMANTIC))
        yield Arm(f"{prefix}+hybrid", preset, _select("topk", _HYBRID))
        yield Arm(f"{prefix}+random", preset, _select("topk", _RANDOM), seeds=_RANDOM_SEEDS)
        yield Arm(f"{prefix}+dpp", preset, _select("dpp", _HYBRID))
        yield Arm(f"{prefix}+dpp-semantic", preset, _select("dpp", _SEMANTIC))
        yield Arm(f"{prefix}+maxmin", preset, _select("maxmin", _UNREAD))


def _scorers() -> Iterator[Arm]:
    """Every score under both rules that read one."""
    rules: tuple[tuple[Select, str], ...] = (("topk", ""), ("dpp", "dpp-"))
    for rule, prefix in rules:
        for scorer in _SCORERS:
            yield Arm(f"w4a4+{prefix}{scorer}", None, _select(rule, {**_SEMANTIC, "semantic": scorer}))
        for scorer in _SCORERS:
            yield Arm(f"w4a4+{prefix}hybrid-{scorer}", None, _select(rule, {**_HYBRID, "semantic": scorer}))
        yield Arm(f"w4a4+{prefix}hybrid-rms", None, _select(rule, {**_HYBRID, "score_input": "rms"}))
        yield Arm(f"w4a4+{prefix}sensitivity", None, _select(rule, _SENSITIVITY))
    # Diverse selection whose quality says nothing: what is left of it is diversity.
    yield Arm("w4a4+dpp-random", None, _select("dpp", _RANDOM), seeds=_RANDOM_SEEDS)


ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in (*_paper(), *_scorers())})

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "paper": (FULL, "w4a4", "full+semantic", "w4a4+semantic", "w4a4+hybrid", "w4a4+random"),
        "selectors": ("w4a4+hybrid", "w4a4+dpp", "w4a4+dpp-semantic", "w4a4+maxmin"),
        "scorers": (*(arm.name for arm in _scorers()), "w4a4+random"),
        "all": tuple(ARMS),
    }
)


def choose_arms(names: Sequence[str], custom: Sequence[str] = ()) -> list[Arm]:
    """Returns arms by name, each once, in the order in which they are named; those of groups are optional.

    Args:
        names: Names of arms or of groups.
        custom: More arms, as `parse_arm` reads them.

    Raises:
        InputError: There is no such arm, or two have the same name.
    """
    chosen: dict[str, Arm] = {}
    for name in names:
        if name not in ARMS and name not in GROUPS:
            raise InputError(f"arm {name[:40]!r} does not exist; choose from {', '.join([*GROUPS, *ARMS])}")
        if name in ARMS:
            chosen[name] = ARMS[name]
        for member in GROUPS.get(name, ()):
            chosen.setdefault(member, replace(ARMS[member], optional=True))
    for text in custom:
        arm = parse_arm(text)
        if arm.name in chosen or arm.name in ARMS:
            raise InputError(f"there are two arms {arm.name[:40]!r}; give one another name")
        chosen[arm.name] = arm
    if not chosen:
        raise InputError(f"there is no arm to evaluate; choose from {', '.join([*GROUPS, *ARMS])}")
    return list(chosen.values())


def parse_arm(text: str) -> Arm:
    """Reads an arm from `NAME=PRESET[,FIELD=VALUE...]`; a value is YAML.

    Raises:
        InputError: The text is not of that form.
    """
    name, equals, rest = text.partition("=")
    preset, *settings = rest.split(",")
    pairs = [setting.partition("=") for setting in settings]
    if not equals or not name.strip() or not preset.strip() or not all(key and mark for key, mark, _ in pairs):
        raise InputError(f"--arm {text[:60]!r} is not NAME=PRESET,FIELD=VALUE, like rms=rotate,score_input=rms")
    try:
        fields = {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise InputError(f"--arm {text[:60]!r} has a value that is not YAML; correct it") from error
    return Arm(name.strip(), preset.strip(), fields)
