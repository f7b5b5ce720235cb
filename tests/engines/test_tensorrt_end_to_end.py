"""What the exporter builds for TensorRT is what the runtime loads: on a fake builder, library and GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from qavp_export import QavpModel, pipeline
from qavp_export.engines import EngineOptions
from qavp_export.engines.tensorrt import build, runtime
from qavp_export.engines.tensorrt.keys import TENSORRT
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.engines.tensorrt.worker import Report, Request
from qavp_export.manifest import Manifest
from qavp_export.recipe import make_recipe
from tests.engines.fake_cuda import FakeDevice
from tests.engines.fake_tensorrt import VERSION, FakeTensorRt, save_engine
from tests.engines.generations import check_close, run_all

OPTIONS = EngineOptions(threads=1)
# Of the largest logit, and of the largest feature: keys, values, queries, the head and the vision tower's products of
# 16 bits differ by 2**-11 each; 3e-3 was seen. A wrong position makes 0.1.
HALF_ROUNDING = 1e-2
QUESTIONS = ["what is the color of the circle ?", "left or right ?", "a circle"]


def _build(request: Request, _: Path, __: Callable[[int, int], None] | None = None) -> Report:
    """Stands in for the process that builds."""
    model = onnx.load(str(request.model))
    names = {value.name for value in model.graph.input}
    pasts = {value.name: value.name.replace("present.", "past_key_values.") for value in model.graph.output}
    aliases = {present: past for present, past in pasts.items() if past in names}
    profiles = [{name: (bounds[0], bounds[2]) for name, bounds in shapes.items()} for shapes in request.profiles]
    save_engine(model, Path(str(request.engine)), profiles, aliases)
    return Report(VERSION, 89, 13000)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    folder = tmp_path_factory.mktemp("trt")
    target = folder / "bundle"
    recipe = make_recipe("none", {"keep": 0.25})
    pipeline.export(tiny_llava, recipe, target, name="tiny", force=False, progress=lambda *_: None)
    # The fake builder does not tell what layers run in.
    targets = EngineTargets(flavours=(TENSORRT,), max_batch=3, allow_precision_fallback=True)
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "run_worker", _build)
        build.build_tensorrt_engines(target, Manifest.read(target), targets, folder / "work", lambda *_: None)
    return target


@pytest.fixture
def models(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[QavpModel, QavpModel]:
    """The bundle on TensorRT, and on the reference engine."""
    device = FakeDevice()
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(device))
    monkeypatch.setattr(runtime.Device, "open", lambda: device)
    return QavpModel.from_bundle(bundle, TENSORRT), QavpModel.from_bundle(bundle, "ort-reference", OPTIONS)


def _images() -> list[Any]:
    rng = np.random.default_rng(3)
    return [*(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(2)), None]


def test_the_engines_compute_what_the_canonical_graphs_do(models: tuple[QavpModel, QavpModel]) -> None:
    found, expected = (model.prepare(_images(), QUESTIONS) for model in models)
    np.testing.assert_array_equal(np.array(found.kept_indices), np.array(expected.kept_indices))
    check_close(found.inputs_embeds, expected.inputs_embeds, HALF_ROUNDING)
    steps = np.random.default_rng(1).integers(5, 60, (3, 12))
    pairs = zip(*(run_all(model.engine, expected, steps) for model in models), strict=True)
    for actual, wanted in pairs:
        check_close(actual, wanted, HALF_ROUNDING)


def test_answers(models: tuple[QavpModel, QavpModel]) -> None:
    found, expected = (model.generate_ids(_images(), QUESTIONS, max_new_tokens=12) for model in models)
    assert found == expected
    assert len({tuple(answer) for answer in expected}) == 3
