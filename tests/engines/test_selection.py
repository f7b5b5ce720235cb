"""Diverse selection on engines: the form that the CPU runs, and TensorRT-RTX, which builds the function as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from qavp_export import EngineOptions, QavpModel, pipeline
from qavp_export.engines.ort.lowering.capabilities import CPU
from qavp_export.engines.ort.lowering.vision import lower_vision
from qavp_export.engines.tensorrt.keys import TENSORRT_RTX
from qavp_export.engines.tensorrt.lowering.capabilities import TENSORRT_RTX as RTX_CAPABILITIES
from qavp_export.engines.tensorrt.lowering.vision import lower_vision as lower_for_rtx
from qavp_export.engines.tensorrt.process import run_worker
from qavp_export.engines.tensorrt.worker import Request
from qavp_export.numerics.diverse import Diversity
from qavp_export.recipe import make_recipe
from qavp_export.settings import settle
from qavp_export.source import Source, open_source
from tests.engines.rtx import requires_rtx
from tests.passes.graphs import session

BOTH: list[Diversity] = ["dpp", "maxmin"]
IMAGE = (3, 40, 40)


@pytest.fixture(scope="module")
def traced(tiny_llava: Path) -> tuple[Source, dict[str, ir.Model]]:
    """A tiny LLaVA and its graphs."""
    source = open_source(tiny_llava, "tiny")
    return source, pipeline.trace(source, lambda *_: None)[0]


@pytest.fixture(scope="module", params=BOTH)
def vision(
    request: pytest.FixtureRequest, traced: tuple[Source, dict[str, ir.Model]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its vision encoder, pruned, with its weights."""
    source, graphs = traced[0], {"vision_encoder": traced[1]["vision_encoder"].clone()}
    pipeline.prune(graphs, settle(make_recipe("rtn", {"select": request.param}), source.family, source.plan))
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    ir.save(graphs["vision_encoder"], path, external_data="model.onnx.data")
    return path


def test_the_cpu_chooses_the_same_tokens_by_integer_products(vision: Path) -> None:
    model = ir.load(vision)
    ir.external_data.load_to_model(model)
    lowered = lower_vision(model, "fp32", CPU).model
    assert "MatMulInteger" in _operators(lowered)
    assert "MatMulInteger" not in _operators(model)
    feeds = {"pixel_values": np.random.default_rng(2).standard_normal((3, *IMAGE)).astype(np.float32)}
    features, kept = session(model, optimize=True).run(None, feeds)
    lowered_features, lowered_kept = session(lowered, optimize=True).run(None, feeds)
    np.testing.assert_array_equal(lowered_kept, kept)
    np.testing.assert_array_equal(lowered_features, features)


def _operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.functions["qavp", "SelectDiverse", ""].all_nodes()}


def test_a_bundle_says_how_it_selects_and_engines_agree(tiny_llava: Path, tmp_path: Path) -> None:
    recipe = make_recipe("rtn", {"select": "dpp", "keep": 0.3})
    manifest = pipeline.export(
        tiny_llava, recipe, tmp_path / "bundle", name="tiny", force=False, progress=lambda *_: None
    )
    assert manifest.recipe["select"] == "dpp"
    assert (manifest.parity["verdict"], manifest.parity["kept_indices_equal"]) == ("PASS", 1.0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8))
    kept = []
    for engine in ("ort-reference", "ort-cpu"):
        model = QavpModel.from_bundle(tmp_path / "bundle", engine=engine, options=EngineOptions(vision="fp32"))
        kept.append(model.prepare([image], ["w1"]).kept_indices[0])
    assert len(kept[0]) == 8
    np.testing.assert_array_equal(*kept)


@requires_rtx
def test_tensorrt_rtx_builds_the_loop(vision: Path, tmp_path: Path) -> None:
    shapes = [[images, *IMAGE] for images in (1, 1, 4)]
    model, engine = tmp_path / "vision.onnx", tmp_path / "vision.engine"
    ir.save(lower_for_rtx(ir.load(vision), RTX_CAPABILITIES).model, model, external_data="vision.onnx.data")
    request = Request(
        TENSORRT_RTX,
        report="",
        model=str(model),
        engine=str(engine),
        profiles=({"pixel_values": shapes},),
        capabilities=(89,),
    )
    # A parser's or builder's error is raised.
    run_worker(request, tmp_path)
    assert engine.stat().st_size > 0
