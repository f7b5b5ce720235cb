"""Fixtures: a bundle with engines for a fake TensorRT, and what it is compared with."""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qavp_export import QavpModel
from qavp_export.engines import EngineOptions
from qavp_export.engines.tensorrt import runtime
from tests.engines.fake_cuda import FakeDevice
from tests.engines.fake_tensorrt import FakeTensorRt
from tests.engines.tensorrt_bundle import Fake, Install, add_engines
from tests.runtime import tiny_bundle


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made by hand, without engines."""
    return tiny_bundle.write_bundle(tmp_path_factory.mktemp("plain") / "bundle")


@pytest.fixture(scope="session")
def reference(plain: Path) -> QavpModel:
    """What `plain` answers."""
    return QavpModel.from_bundle(plain, "ort-reference", EngineOptions(threads=1))


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(5)]


@pytest.fixture
def install(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Returns what makes a bundle with engines, and a machine for it; see `tensorrt_bundle.add_engines`."""
    number = itertools.count()

    def make(flavour: str = "tensorrt", *, aliasing: bool = True, capturable: bool = True, **settings: Any) -> Fake:
        bundle = shutil.copytree(plain, tmp_path / f"bundle{next(number)}")
        add_engines(bundle, flavour, **settings)
        device = FakeDevice()
        trt = FakeTensorRt(device, aliasing=aliasing, capturable=capturable)
        monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), trt)
        monkeypatch.setattr(runtime.Device, "open", lambda: device)
        return Fake(bundle, device, trt)

    return make
