"""What the exporter builds for TensorRT is what the runtime loads: on a fake builder, library and GPU."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from qavp_export import QavpModel, pipeline
from qavp_export.engines import EngineOptions
from qavp_export.engines.tensorrt import build, runtime
from qavp_export.engines.tensorrt.keys import ALTERNATING, IN_PLACE, TENSORRT, EngineKeys
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.engines.tensorrt.worker import Report, Request
from qavp_export.errors import UnavailableError
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


# The newest release, one whose parser has no cache update, and one that has none of ONNX's newer operators either; with
# where each writes keys and values.
RELEASES = {VERSION: IN_PLACE, "10.14.1.48": ALTERNATING, "10.13.3.9": ALTERNATING}


def _build(release: str, request: Request, _: Path, __: Callable[[int, int], None] | None = None) -> Report:
    """Stands in for the process that builds."""
    if request.model is None:
        return Report(release, 89, 13000)
    model = onnx.load(str(request.model))
    names = {value.name for value in model.graph.input}
    pasts = {value.name: value.name.replace("present.", "past_key_values.") for value in model.graph.output}
    updated = {node.output[0] for node in model.graph.node if node.op_type == "TensorScatter"}
    aliases = {present: past for present, past in pasts.items() if past in names and present in updated}
    profiles = [{name: (bounds[0], bounds[2]) for name, bounds in shapes.items()} for shapes in request.profiles]
    save_engine(model, Path(str(request.engine)), profiles, aliases)
    return Report(release, 89, 13000)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    """A bundle without engines for TensorRT."""
    target = tmp_path_factory.mktemp("trt") / "bundle"
    recipe = make_recipe("none", {"keep": 0.25})
    pipeline.export(tiny_llava, recipe, target, name="tiny", force=False, progress=lambda *_: None)
    return target


@pytest.fixture(scope="module", params=RELEASES)
def bundle(request: pytest.FixtureRequest, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with engines of one release."""
    folder = tmp_path_factory.mktemp("built")
    target = shutil.copytree(exported, folder / "bundle")
    # The fake builder does not tell what layers run in.
    targets = EngineTargets(flavours=(TENSORRT,), max_batch=3, allow_precision_fallback=True)
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "run_worker", partial(_build, request.param))
        checked = build.check_targets(targets, {"float"}, 128, 6)
        build.build_tensorrt_engines(target, Manifest.read(target), checked, folder / "work", lambda *_: None)
    return target


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def models(bundle: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> tuple[QavpModel, QavpModel]:
    """The bundle on TensorRT, and on the reference engine."""
    keys = EngineKeys.read(bundle, TENSORRT)
    assert keys.cache == RELEASES[keys.version]
    # Only a release with a cache update can tell of memory that is input and output.
    library = FakeTensorRt(device, keys.version, aliasing=keys.cache == IN_PLACE)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
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


def test_answers(models: tuple[QavpModel, QavpModel], bundle: Path, device: FakeDevice) -> None:
    found, expected = (model.generate_ids(_images(), QUESTIONS, max_new_tokens=12) for model in models)
    assert found == expected
    assert len({tuple(answer) for answer in expected}) == 3
    # A step on each side of the cache is captured, behind one that is not.
    sides = 1 if EngineKeys.read(bundle, TENSORRT).cache == IN_PLACE else 2
    steps = max(len(answer) for answer in expected) - 1
    assert (device.captures, device.launches) == (sides, steps - sides)


def test_the_oldest_release_gets_operators_that_its_parser_takes(bundle: Path) -> None:
    keys = EngineKeys.read(bundle, TENSORRT)
    newer = set()
    for graph in keys.graphs.values():
        model = onnx.load(bundle / "engines" / TENSORRT / graph.file)
        onnx.checker.check_model(model, full_check=True)
        # What its release notes and changelog add: ONNX 1.16's in 10.13, `Attention` in 10.14, all others in 10.15.
        known = 21 if keys.version.startswith("10.13") else 24
        assert {entry.version for entry in model.opset_import if not entry.domain} <= set(range(known + 1))
        standard = [node for node in model.graph.node if not node.domain]
        newer |= {node.op_type for node in standard if not onnx.defs.has(node.op_type, 21)}
    added = {"10.13": set(), "10.14": {"Attention"}, "11.4.": None}[keys.version[:5]]
    assert newer == ({"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"} if added is None else added)


def test_an_older_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "run_worker", partial(_build, "10.12.0.36"))
    targets = EngineTargets(flavours=(TENSORRT,))
    with pytest.raises(UnavailableError, match=r"TensorRT 10\.12\.0\.36 is older than 10\.13: install a newer one"):
        build.check_targets(targets, {"w4a4"}, 128, 3)
