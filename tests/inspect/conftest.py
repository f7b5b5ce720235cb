"""Bundles of the tiny LLaVA: 25 tokens in a 5x5 grid; and a picture for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qavp_export import pipeline
from qavp_export.recipe import make_recipe
from tests.models.tiny import TinySpec


def _export(model: Path, target: Path, recipe: str = "none", **fields: Any) -> Path:
    made, quiet = make_recipe(recipe, fields), lambda *_: None
    pipeline.export(model, made, target, name="tiny", force=False, progress=quiet)
    return target


@pytest.fixture(scope="session")
def best(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    """Keeps the 7 of 25 tokens with the highest scores, at W4A4 and rotated."""
    fields = {"keep": 0.28, "select": "topk", "algorithm": "rtn"}
    return _export(tiny_llava, tmp_path_factory.mktemp("best") / "bundle", "rotate", **fields)


@pytest.fixture(scope="session")
def diverse(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    """Keeps 7 tokens that differ, with settings that are not the defaults."""
    fields = {"keep": 0.28, "select": "dpp", "semantic": "norm", "alpha": 0.25, "score_input": "rms", "group_size": 16}
    return _export(tiny_llava, tmp_path_factory.mktemp("diverse") / "bundle", **fields)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    return _export(tiny_llava, tmp_path_factory.mktemp("dense") / "bundle", keep=1.0)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    side = TinySpec().image_size
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 160, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
