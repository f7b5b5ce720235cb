"""Fixtures: the tiny bundle and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime import tiny_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (4, 4, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(picture).save(path)
    return path
