"""Accuracy out of the file of a qavp-eval run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qavp_export.bench.accuracy import Accuracy, read_accuracy
from qavp_export.errors import InputError
from qavp_export.manifest import MANIFEST_NAME

RECIPE = {"name": "rotate", "keep": 0.5, "seed": 0}


@pytest.fixture
def bundles(bundle: Path, tmp_path: Path) -> list[Path]:
    """Two bundles; the second has a recipe."""
    folders = [shutil.copytree(bundle, tmp_path / name) for name in ("one", "two")]
    manifest = json.loads((folders[1] / MANIFEST_NAME).read_text())
    (folders[1] / MANIFEST_NAME).write_text(json.dumps(manifest | {"recipe": RECIPE}))
    return folders


def arm(accuracy: float, bundles: list[str], recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "interval_95": [accuracy - 0.1, accuracy + 0.1],
        "bundles": bundles,
        "recipe": recipe or {"name": "other"},
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_bundles_are_found_by_folder_or_by_recipe(bundles: list[Path], tmp_path: Path) -> None:
    arms = {
        "full": {"fidelity": {}},
        # Several seeds: of none of them alone.
        "random": arm(0.3, ["seed0", "seed1"], RECIPE),
        "a": arm(0.5, ["one"]),
        "b": arm(0.75, ["elsewhere"], RECIPE),
    }
    path = write(tmp_path / "eval.json", {"data": {"name": "demo"}, "arms": arms})
    assert read_accuracy(path, bundles) == {
        bundles[0]: Accuracy(0.5, 0.4, 0.6, "eval.json, arm a"),
        bundles[1]: Accuracy(0.75, 0.65, 0.85, "eval.json, arm b"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ([], "is not what qavp-eval"),
        ({"arms": {"a": {"accuracy": 0.5}}}, "is not what qavp-eval"),
        ({"arms": {"a": arm(0.5, ["other"])}}, "has none of the bundles: its arms are a;"),
        ({"arms": {"a": {"fidelity": {}}}}, "without accuracy"),
    ],
)
def test_other_files_are_refused(bundles: list[Path], tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_accuracy(write(tmp_path / "eval.json", content), bundles)


def test_a_missing_file_is_refused(bundles: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_accuracy(tmp_path / "no.json", bundles)
