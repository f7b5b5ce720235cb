"""Accuracy of arms on the same questions, and whether they differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qavp_export.evaluate.arms import Arm
from qavp_export.evaluate.datasets import DataSet, Item
from qavp_export.evaluate.metrics import METRICS
from qavp_export.manifest import Manifest
from qavp_export.runtime import ImageSource, QavpModel
from qavp_export.runtime.model import ImagesOfPrompt
from qavp_export.statistics import Interval, McNemar, bootstrap_interval, mcnemar, mean, paired_bootstrap

# From this score on an answer counts as right where only right and wrong can be counted.
_RIGHT = 0.5

Done = Callable[[int], None]
"""Called with the number of questions that are answered."""


@dataclass(frozen=True)
class ArmScores:
    """What one arm scored.

    Attributes:
        arm: The arm.
        manifest: The manifest of its first seed's bundle.
        bundles: Folder names of its bundles, one for each seed.
        scores: Score of each seed's answer to each question `[seeds, n]`.
        foreground_kept: Share of the tokens showing an object that survive, mean over pictures and seeds; None where
            the data or the model do not tell.
    """

    arm: Arm
    manifest: Manifest
    bundles: tuple[str, ...]
    scores: npt.NDArray[np.float64]
    foreground_kept: float | None = None

    def to_dict(self, kinds: Sequence[str], seed: int) -> dict[str, Any]:
        """Returns the figures as JSON values.

        Args:
            kinds: Type of each question.
            seed: Seed of the intervals.
        """
        means = self.scores.mean(axis=0)
        overall = bootstrap_interval(means, mean, seed)
        by_type = {}
        for kind in dict.fromkeys(kinds):
            chosen = means[[other == kind for other in kinds]]
            found = bootstrap_interval(chosen, mean, seed)
            by_type[kind] = {
                "questions": len(chosen),
                "accuracy": found.estimate,
                "interval_95": [found.low, found.high],
            }
        tokens = self.manifest.vision_tokens
        return {
            "accuracy": overall.estimate,
            "interval_95": [overall.low, overall.high],
            "by_type": by_type,
            "seeds": len(self.scores),
            "accuracy_by_seed": self.scores.mean(axis=1).tolist(),
            "vision_tokens": {"before": tokens.before, "after": tokens.after},
            "foreground_kept": self.foreground_kept,
            "recipe": self.manifest.recipe,
            "bundles": list(self.bundles),
        }


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same questions.

    Attributes:
        a: Name of one arm.
        b: Name of the other.
        difference: Accuracy of `a` less that of `b`; questions are resampled, seeds are not.
        test: McNemar's exact test; None where an arm has several seeds, whose outcomes on one question depend on one
            another.
    """

    a: str
    b: str
    difference: Interval
    test: McNemar | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        test = self.test
        return {
            "a": self.a,
            "b": self.b,
            "difference": self.difference.estimate,
            "interval_95": [self.difference.low, self.difference.high],
            "mcnemar": None if test is None else {"only_a": test.only_a, "only_b": test.only_b, "p": test.p},
        }


def score_items(
    model: QavpModel, data: DataSet, batch: int, max_new_tokens: int, done: Done
) -> npt.NDArray[np.float64]:
    """Asks a model every question, greedily, and judges its answers.

    Args:
        model: The model.
        data: The questions.
        batch: Questions at once.
        max_new_tokens: Most tokens of an answer.
        done: Called as the work goes on.

    Returns:
        The scores `[n]`, 0 to 1.

    Raises:
        ImageError: A picture cannot be read.
        PromptError: A question does not fit the context.
    """
    judge = METRICS[data.metric]
    scores: list[float] = []
    for start in range(0, len(data.items), batch):
        items = data.items[start : start + batch]
        answers = model.generate(
            pictures(items), [item.prompt for item in items], max_new_tokens=max_new_tokens, temperature=0.0
        )
        scores += [judge(answer.strip(), item) for answer, item in zip(answers, items, strict=True)]
        done(len(scores))
    return np.array(scores, np.float64)


def foreground_kept(model: QavpModel, items: Sequence[Item], batch: int) -> float | None:
    """Returns the share of the tokens showing an object that a model keeps, mean over pictures.

    Args:
        model: The model.
        items: The questions; those whose foreground is empty or not known do not count.
        batch: Questions at once.

    Returns:
        0 to 1; None if no foreground is known, or it is that of a model with other vision tokens.
    """
    tokens = model.manifest.vision_tokens.before
    known = [(item, item.foreground) for item in items if item.foreground is not None and item.foreground.any()]
    if not known or any(mask.size != tokens for _, mask in known):
        return None
    shares: list[float] = []
    for start in range(0, len(known), batch):
        part = known[start : start + batch]
        shown = [item for item, _ in part]
        kept = model.prepare(pictures(shown), [item.prompt for item in shown]).kept_indices
        shares += [float(mask[indices].sum() / mask.sum()) for (_, mask), indices in zip(part, kept, strict=True)]
    return float(np.mean(shares))


def pictures(items: Sequence[Item]) -> list[ImagesOfPrompt]:
    """Returns the images of a batch as `QavpModel` takes them."""

    def show(image: ImageSource | None) -> ImagesOfPrompt:
        return [] if image is None else [image]

    return [show(item.image) for item in items]


def compare_arms(results: Mapping[str, ArmScores], seed: int) -> list[Comparison]:
    """Compares every two arms, the later with the earlier.

    Args:
        results: Scores by arm name, all on the same questions.
        seed: Seed of the intervals.
    """
    return [_compare(results[a], results[b], seed) for b, a in itertools.combinations(results, 2)]


def _compare(a: ArmScores, b: ArmScores, seed: int) -> Comparison:
    single = len(a.scores) == len(b.scores) == 1
    return Comparison(
        a.arm.name,
        b.arm.name,
        paired_bootstrap(a.scores.mean(axis=0), b.scores.mean(axis=0), seed),
        mcnemar(a.scores[0] >= _RIGHT, b.scores[0] >= _RIGHT) if single else None,
    )
