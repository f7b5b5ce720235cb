"""The whole comparison: exports what is missing, asks every arm, and says how they differ."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qavp_export.engines import EngineOptions
from qavp_export.errors import InputError, RecipeError
from qavp_export.evaluate.accuracy import ArmScores, Done, compare_arms, foreground_kept, score_items
from qavp_export.evaluate.arms import ARMS, FULL, Arm
from qavp_export.evaluate.bundles import Bundles
from qavp_export.evaluate.datasets import DataSet, Item
from qavp_export.evaluate.fidelity import Fidelity, answer_freely, compare_fidelity, follow
from qavp_export.pipeline import Progress
from qavp_export.recipe import Recipe
from qavp_export.runtime import QavpModel


@dataclass(frozen=True)
class Setup:
    """What all arms have in common.

    Attributes:
        quantized: Preset of the quantized arms.
        keep: Share of vision tokens that pruned arms keep.
        seed: First seed of the arms, and seed of the intervals.
        engine: What runs the bundles.
        options: How it runs them.
        batch: Questions at once.
        max_new_tokens: Most tokens of an answer.
        clip: Name of the CLIP checkpoint that the scorer `text` reads questions with; None: there is none.
    """

    quantized: str = "rotate"
    keep: float = 0.125
    seed: int = 0
    engine: str = "ort-cpu"
    options: EngineOptions = field(default_factory=EngineOptions)
    batch: int = 20
    max_new_tokens: int = 16
    clip: str | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_new_tokens < 1:
            raise InputError("--batch and --max-new-tokens are 1 or more")


class Evaluation:
    """Arms of one checkpoint, their recipes checked before anything is exported.

    Args:
        bundles: Where the arms' bundles are.
        arms: The arms.
        setup: What they have in common.
        progress: Called as the work goes on, with a stage, what is done of it, and all of it.

    Raises:
        RecipeError: An arm's recipe is not valid or does not fit the checkpoint.
    """

    def __init__(self, bundles: Bundles, arms: Sequence[Arm], setup: Setup, progress: Progress) -> None:
        self._bundles = bundles
        self._setup = setup
        self._progress = progress
        self._arms = arms
        # By arm, one for each seed.
        self._recipes: Mapping[str, list[Recipe]] = {arm.name: self._recipes_of(arm) for arm in arms}
        for recipe in self._all_recipes():
            bundles.path(recipe)

    def export(self, *, reference: bool = False) -> None:
        """Exports what is missing, so that a fault shows before the first question is asked.

        Args:
            reference: Whether full precision with all tokens is needed, arm or not.
        """
        missing = reference and FULL not in self._recipes
        recipes = [*(self._recipes_of(ARMS[FULL]) if missing else []), *self._all_recipes()]
        for number, recipe in enumerate(recipes):
            self._progress("export", number, len(recipes))
            self._bundles.get(recipe, lambda *_: None)
        self._progress("export", len(recipes), len(recipes))

    def accuracy(self, data: DataSet) -> dict[str, ArmScores]:
        """Asks every arm every question; needs `export`."""
        results = {}
        counter = self._counter("ask", len(data.items), len(self._all_recipes()))
        for arm in self._arms:
            scores, paths, shares = [], [], []
            for recipe in self._recipes[arm.name]:
                path, model = self._load(recipe)
                scores.append(score_items(model, data, self._setup.batch, self._setup.max_new_tokens, next(counter)))
                paths.append(path.name)
                shares.append(foreground_kept(model, data.items, self._setup.batch))
            told = [share for share in shares if share is not None]
            foreground = float(np.mean(told)) if told else None
            results[arm.name] = ArmScores(arm, model.manifest, tuple(paths), np.stack(scores), foreground)
        return results

    def fidelity(self, items: Sequence[Item]) -> dict[str, Fidelity]:
        """Lets every arm but the reference read what that answers, means over an arm's seeds; needs `export`."""
        setup = self._setup
        followers = [arm for arm in self._arms if arm.name != FULL]
        counter = self._counter("follow", len(items), 1 + sum(len(self._recipes[arm.name]) for arm in followers))
        found = {}
        with tempfile.TemporaryDirectory(prefix="qavp-eval-") as scratch:
            _, model = self._load(self._recipes_of(ARMS[FULL])[0])
            reference = answer_freely(model, items, Path(scratch), setup.batch, setup.max_new_tokens, next(counter))
            for arm in followers:
                runs = []
                for recipe in self._recipes[arm.name]:
                    _, model = self._load(recipe)
                    runs.append(follow(model, items, reference, setup.batch, next(counter)))
                found[arm.name] = Fidelity(
                    np.mean([run.kl for run in runs], axis=0), np.mean([run.agreement for run in runs], axis=0)
                )
        return found

    def _recipes_of(self, arm: Arm) -> list[Recipe]:
        return arm.recipes(self._setup.quantized, self._setup.keep, self._setup.seed)

    def _all_recipes(self) -> list[Recipe]:
        return [recipe for recipes in self._recipes.values() for recipe in recipes]

    def _load(self, recipe: Recipe) -> tuple[Path, QavpModel]:
        path = self._bundles.path(recipe)
        return path, QavpModel.from_bundle(path, self._setup.engine, self._setup.options)

    def _counter(self, stage: str, items: int, runs: int) -> Iterator[Done]:
        """Yields for each run what counts its items, in one bar for all: its estimate is that of the whole."""
        total = items * runs
        self._progress(stage, 0, total)
        for run in range(runs):
            yield partial(_count, self._progress, stage, run * items, total)


def _count(progress: Progress, stage: str, before: int, total: int, done: int) -> None:
    progress(stage, before + done, total)


def report(
    accuracy: Mapping[str, ArmScores],
    fidelity: Mapping[str, Fidelity],
    data: DataSet | None,
    prompts: int,
    setup: Setup,
) -> dict[str, Any]:
    """Returns everything that was found as JSON values.

    Args:
        accuracy: What `Evaluation.accuracy` found; empty if it was not asked for.
        fidelity: What `Evaluation.fidelity` found; empty if it was not asked for.
        data: The questions of `accuracy`.
        prompts: Number of prompts of `fidelity`.
        setup: What the arms had in common.
    """
    kinds = [] if data is None else [item.kind for item in data.items]
    arms: dict[str, dict[str, Any]] = {name: scores.to_dict(kinds, setup.seed) for name, scores in accuracy.items()}
    for name, found in fidelity.items():
        arms.setdefault(name, {})["fidelity"] = found.to_dict(setup.seed)
    return {
        "recipe": setup.quantized,
        "keep": setup.keep,
        "seed": setup.seed,
        "engine": setup.engine,
        "max_new_tokens": setup.max_new_tokens,
        "clip": setup.clip,
        "data": None if data is None else {"name": data.name, "questions": len(kinds), "metric": data.metric},
        "fidelity": {"prompts": prompts, "reference": FULL} if fidelity else None,
        "arms": arms,
        "comparisons": [comparison.to_dict() for comparison in compare_arms(accuracy, setup.seed)],
        "fidelity_comparisons": compare_fidelity(fidelity, setup.seed),
    }


def leave_out(bundles: Bundles, arms: Sequence[Arm], setup: Setup) -> tuple[list[Arm], dict[str, str]]:
    """Leaves out the optional arms whose scorer the checkpoint cannot serve.

    Args:
        bundles: Where the arms' bundles are.
        arms: The arms.
        setup: What they have in common.

    Returns:
        The other arms, and by name why each was left out.

    Raises:
        RecipeError: An arm that is not optional cannot be served, none is left, or none reads the CLIP checkpoint.
    """
    kept: list[Arm] = []
    left_out: dict[str, str] = {}
    asked = False
    for arm in arms:
        recipe = arm.recipes(setup.quantized, setup.keep, setup.seed)[0]
        try:
            bundles.check_scorer(recipe)
        except RecipeError as error:
            if not arm.optional:
                raise RecipeError(f"arm {arm.name}: {error}") from error
            left_out[arm.name] = str(error)
        else:
            kept.append(arm)
            asked |= recipe.semantic == "text"
    if not kept:
        raise RecipeError(f"no arm is left to evaluate: {next(iter(left_out.values()))}")
    if setup.clip is not None and not asked:
        raise RecipeError("--clip is read by no arm; name one with semantic text, like w4a4+text, or leave --clip out")
    return kept, left_out


def with_suffix(data: DataSet, suffix: str) -> DataSet:
    """Returns the data with a text behind every question."""
    return replace(data, items=tuple(replace(item, prompt=item.prompt + suffix) for item in data.items))
