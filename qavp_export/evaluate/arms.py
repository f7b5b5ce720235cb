"""The arms of a comparison: what is exported from the checkpoint, each a preset and recipe fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import yaml

from qavp_export.errors import InputError
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
    """

    name: str
    preset: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    pruned: bool = True
    seeds: int = 1

    def recipes(self, quantized: str, keep: float, seed: int) -> list[Recipe]:
        """Returns one recipe for each seed.

        Args:
            quantized: Preset of the arms that name none.
            keep: Share of the vision tokens that pruned arms keep, unless their fields say otherwise.
            seed: The first seed.

        Raises:
            RecipeError: A field is unknown or out of range, or there is no such preset.
        """
        share: dict[str, Any] = {} if "keep_range" in self.fields else {"keep": keep if self.pruned else 1.0}
        return [
            make_recipe(self.preset or quantized, share | {"seed": number} | dict(self.fields))
            for number in range(seed, seed + self.seeds)
        ]


# The paper's score is spelled out, so that another default leaves the comparison as it is.
_SEMANTIC: Mapping[str, Any] = MappingProxyType({"select": "topk", "alpha": 1.0})
_HYBRID: Mapping[str, Any] = MappingProxyType({"select": "topk", "alpha": 0.5, "score_input": "raw"})
_RANDOM: Mapping[str, Any] = MappingProxyType({"select": "topk", "alpha": 1.0, "semantic": "random"})
_DPP: Mapping[str, Any] = MappingProxyType({"select": "dpp", "alpha": 0.5, "score_input": "raw"})
_DPP_SEMANTIC: Mapping[str, Any] = MappingProxyType({"select": "dpp", "alpha": 1.0})
_MAXMIN: Mapping[str, Any] = MappingProxyType({"select": "maxmin"})

ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        arm.name: arm
        for arm in (
            Arm(FULL, "none", pruned=False),
            Arm("w4a4", None, pruned=False),
            Arm("full+semantic", "none", _SEMANTIC),
            Arm("full+hybrid", "none", _HYBRID),
            Arm("full+random", "none", _RANDOM, seeds=_RANDOM_SEEDS),
            Arm("full+dpp", "none", _DPP),
            Arm("full+maxmin", "none", _MAXMIN),
            Arm("w4a4+semantic", None, _SEMANTIC),
            Arm("w4a4+hybrid", None, _HYBRID),
            Arm("w4a4+random", None, _RANDOM, seeds=_RANDOM_SEEDS),
            Arm("w4a4+dpp", None, _DPP),
            Arm("w4a4+dpp-semantic", None, _DPP_SEMANTIC),
            Arm("w4a4+maxmin", None, _MAXMIN),
        )
    }
)

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "paper": (FULL, "w4a4", "full+semantic", "w4a4+semantic", "w4a4+hybrid", "w4a4+random"),
        "selectors": ("w4a4+hybrid", "w4a4+dpp", "w4a4+dpp-semantic", "w4a4+maxmin"),
        "all": tuple(ARMS),
    }
)


def choose_arms(names: Sequence[str], custom: Sequence[str] = ()) -> list[Arm]:
    """Returns arms by name, each once, in the order in which they are named.

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
        chosen |= {member: ARMS[member] for member in GROUPS.get(name, (name,))}
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
