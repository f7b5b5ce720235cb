"""Fixtures: the tiny bundle, opened once, and pictures."""

from __future__ import annotations

import numpy as np
import pytest

from qavp_export import EngineOptions, QavpModel
from tests.runtime import tiny_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return tiny_bundle.write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def model(bundle):
    return QavpModel.from_bundle(bundle, "ort-reference", EngineOptions(threads=1))


@pytest.fixture(scope="session")
def pictures():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(5)]
