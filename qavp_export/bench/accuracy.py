"""Accuracy beside latency: from the file of a qavp-eval run, or measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qavp_export.bench.comparison import Progress
from qavp_export.errors import InputError
from qavp_export.evaluate.accuracy import score_items
from qavp_export.evaluate.datasets import DataSet
from qavp_export.manifest import Manifest
from qavp_export.runtime import QavpModel
from qavp_export.statistics import bootstrap_interval, mean

_BATCH = 8
_ANSWER_TOKENS = 16
_SEED = 0


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a bundle.

    Attributes:
        value: 0 to 1.
        low: Lower bound of its 95% interval.
        high: Upper bound.
        source: What it was measured on.
    """

    value: float
    low: float
    high: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {"accuracy": self.value, "interval_95": [self.low, self.high], "source": self.source}


def measure_accuracy(bundle: Path, engine: str, data: DataSet, progress: Progress) -> Accuracy:
    """Asks a bundle every question of a data set.

    Raises:
        QavpError: The bundle cannot be opened, or a question does not fit it.
    """
    stage = f"accuracy of {bundle.name}"
    model = QavpModel.from_bundle(bundle, engine)
    scores = score_items(model, data, _BATCH, _ANSWER_TOKENS, lambda done: progress(stage, done, len(data.items)))
    interval = bootstrap_interval(scores, mean, _SEED)
    return Accuracy(
        interval.estimate, interval.low, interval.high, f"{data.name}, {len(data.items)} questions, {engine}"
    )


def read_accuracy(path: Path, bundles: Sequence[Path]) -> dict[Path, Accuracy]:
    """Finds bundles in the file that `qavp-eval --json` wrote: by folder, or by a recipe that is the same in all.

    Args:
        path: The file.
        bundles: The bundles.

    Returns:
        The accuracy of each bundle that is there; an arm of several seeds is none of them.

    Raises:
        InputError: The file cannot be read, is not of that kind, or has none of the bundles.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        # Arms of a run for fidelity alone have none.
        judged = {str(name): arm for name, arm in data["arms"].items() if "accuracy" in arm}
        arms = {name: _arm(name, arm, path) for name, arm in judged.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--accuracy {path} cannot be read ({error}); give what qavp-eval --json wrote") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--accuracy {path} is not what qavp-eval --json writes ({error!r} is missing)") from error
    found = {}
    for bundle in bundles:
        recipe = Manifest.read(bundle).recipe
        by_folder = [arm.accuracy for arm in arms.values() if arm.bundles == [bundle.resolve().name]]
        by_recipe = [arm.accuracy for arm in arms.values() if len(arm.bundles) == 1 and arm.recipe == recipe]
        if by_folder or by_recipe:
            found[bundle] = (by_folder or by_recipe)[0]
    if not found:
        raise InputError(
            f"--accuracy {path} has none of the bundles: its arms are {', '.join(arms) or 'without accuracy'}; "
            "evaluate the recipes that are compared, for example with qavp-eval --arm"
        )
    return found


@dataclass(frozen=True)
class _Arm:
    accuracy: Accuracy
    bundles: list[str]
    recipe: Mapping[str, Any]


def _arm(name: str, data: Mapping[str, Any], path: Path) -> _Arm:
    low, high = data["interval_95"]
    accuracy = Accuracy(float(data["accuracy"]), float(low), float(high), f"{path.name}, arm {name}")
    return _Arm(accuracy, [str(bundle) for bundle in data["bundles"]], dict(data["recipe"]))
