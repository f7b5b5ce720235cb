"""The CPU engine on damaged bundles, and on ones that do not hold what is asked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qavp_export import pipeline
from qavp_export.engines import load_engine
from qavp_export.engines.ort import cpu
from qavp_export.engines.ort.plan import CPU_FOLDER, PLAN_NAME
from qavp_export.errors import BundleError, QavpError, UnavailableError
from qavp_export.manifest import Manifest
from qavp_export.recipe import make_recipe
from tests.engines.lowered import OPTIONS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    target = tmp_path_factory.mktemp("damage") / "bundle"
    recipe, quiet = make_recipe("rtn", {"keep": 0.25}), lambda *_: None
    pipeline.export(tiny_llava, recipe, target, name="tiny", force=False, progress=quiet)
    return target


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Manifest.read(bundle)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def _check_broken(folder: Path, manifest: Manifest, match: str) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        load_engine("ort-cpu", folder, manifest, OPTIONS)
    assert "\n" not in str(caught.value)


GRAPHS = ["vision_encoder.w8a8", "prefill", "decode", "head", "probe"]


@pytest.mark.parametrize("name", GRAPHS)
def test_missing_and_damaged_graphs(copy: Path, manifest: Manifest, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "probe":
        monkeypatch.setattr(cpu, "multiplies_exactly", lambda _: True)
    path = copy / CPU_FOLDER / f"{name}.onnx"
    path.write_bytes(path.read_bytes()[:-50])
    _check_broken(copy, manifest, f"{name}.onnx cannot be opened")
    path.unlink()
    _check_broken(copy, manifest, f"{name}.onnx is missing; export the bundle again")


@pytest.mark.parametrize("name", ["decoder", "vision_encoder", "embedding"])
def test_missing_and_truncated_weights(copy: Path, manifest: Manifest, name: str) -> None:
    path = copy / name / "model.onnx.data"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _check_broken(copy, manifest, "export the bundle again")
    path.unlink()
    _check_broken(copy, manifest, "export the bundle again")


def test_a_plan_that_is_missing_or_cannot_be_read(copy: Path, manifest: Manifest) -> None:
    path = copy / CPU_FOLDER / PLAN_NAME
    whole = path.read_text(encoding="utf-8")
    for text in (whole[:-9], "", "[]", "{}", '{"graphs":[]}', '{"graphs":{"head":1},"cache":"x","notes":[]}', "\ud800"):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        _check_broken(copy, manifest, f"{PLAN_NAME} cannot be read")
    path.unlink()
    _check_broken(copy, manifest, f"{PLAN_NAME} is missing")


def _change_plan(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / CPU_FOLDER / PLAN_NAME
    plan = json.loads(path.read_text(encoding="utf-8"))
    change(plan)
    path.write_text(json.dumps(plan), encoding="utf-8")


@pytest.mark.parametrize("file", ["../outside.onnx", "/etc/passwd", "x/../../../../y"])
def test_a_plan_that_names_files_outside_the_bundle(copy: Path, manifest: Manifest, file: str) -> None:
    def graph(plan: dict[str, Any]) -> None:
        plan["graphs"]["decode"]["file"] = file

    def weight(plan: dict[str, Any]) -> None:
        plan["graphs"]["decode"]["file"] = "decode.onnx"
        next(iter(plan["graphs"]["decode"]["weights"][3]["parts"].values()))["file"] = file

    for change in (graph, weight):
        _change_plan(copy, change)
        _check_broken(copy, manifest, "a file outside the bundle")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda plan: plan["graphs"].pop("head"), "has no graph 'head'"),
        (lambda plan: plan["graphs"].pop("probe"), "has no graph 'probe'"),
        (lambda plan: plan["graphs"]["decode"]["weights"][0].update(form="melted"), "unknown form 'melted'"),
        (lambda plan: plan["graphs"]["decode"]["weights"].pop(0), "decode.onnx cannot be opened"),
        (lambda plan: plan["graphs"]["decode"]["inputs"].append("more"), "does not have the inputs and outputs"),
        (lambda plan: plan["graphs"]["head"]["outputs"].append("more"), "does not have the inputs and outputs"),
    ],
)
def test_a_plan_that_does_not_fit_its_graphs(copy: Path, manifest: Manifest, change: Any, match: str) -> None:
    _change_plan(copy, change)
    _check_broken(copy, manifest, match)


def test_little_memory_needs_one_graph_for_both(copy: Path, manifest: Manifest) -> None:
    _change_plan(copy, lambda plan: plan["graphs"].pop("decoder"))
    with pytest.raises(UnavailableError, match="leave cpu_memory=low out") as caught:
        load_engine("ort-cpu", copy, manifest, dataclasses.replace(OPTIONS, cpu_memory="low"))
    assert caught.value.exit_code == 3
    load_engine("ort-cpu", copy, manifest, OPTIONS)


def test_codes_need_a_graph_for_single_tokens(copy: Path, manifest: Manifest) -> None:
    options = dataclasses.replace(OPTIONS, kv_cache="int8")
    with pytest.raises(UnavailableError, match="leave cpu_memory=low or kv_cache=int8 out") as caught:
        load_engine("ort-cpu", copy, manifest, dataclasses.replace(options, cpu_memory="low"))
    assert caught.value.exit_code == 3
    for name in ("decode.int8", "probe.int8"):
        _change_plan(copy, lambda plan, name=name: plan["graphs"].pop(name))
        with pytest.raises(BundleError, match=f"has no graph '{name}'; export the bundle again"):
            load_engine("ort-cpu", copy, manifest, options)
    load_engine("ort-cpu", copy, manifest, OPTIONS)


def test_too_little_memory_is_one_line(copy: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> Iterator[tuple[str, Any]]:
        raise MemoryError
        yield

    monkeypatch.setattr("qavp_export.engines.ort.lowered.read_weights", none_left)
    with pytest.raises(QavpError, match=r"not enough memory for the probe of .*; use --cpu-memory low"):
        load_engine("ort-cpu", copy, manifest, OPTIONS)
