"""TensorRT-RTX builds a decoder's NVFP4 graph for a GPU that is not there."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from qavp_export import pipeline
from qavp_export.passes import FoldWeightTransposes
from qavp_export.passes.place_nvfp4 import PlaceNvfp4
from qavp_export.source import open_source
from tests.engines.rtx import build_engine
from tests.models.tiny import TinySpec, make_llava

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="TensorRT-RTX is published for Linux x86_64 only",
)

FP4_WEIGHT = ["FP4E2M1", "FP8", "Float", "Float"]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder's NVFP4 graph; Qwen2's has biases."""
    folder = tmp_path_factory.mktemp(request.param)
    source = open_source(make_llava(folder / "checkpoint", TinySpec(decoder=request.param)), "tiny")
    graphs, _ = pipeline.trace(source, lambda *_: None)
    FoldWeightTransposes()(graphs["decoder"])
    result = PlaceNvfp4(["/model/layers.*"])(graphs["decoder"])
    assert (result.matched, result.refused) == (14, [])
    path = folder / "model.onnx"
    ir.save(graphs["decoder"], path, external_data="model.onnx.data")
    return path


def test_every_layer_multiplies_fp4_by_fp4_on_blackwell(decoder: Path) -> None:
    build = build_engine(decoder, "SM120")
    assert build.errors == []
    assert build.engine_bytes > 0
    products = {name: gemm for gemm in build.gemms for name in gemm.nodes if name.endswith("proj/MatMul")}
    names = [f"attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += [f"mlp/{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(products) == sorted(f"/model/layers.{layer}/{name}/MatMul" for layer in range(2) for name in names)
    # The builder may drop to float32 without a word (NVIDIA/TensorRT#4833): codes and scales must reach the product.
    for name, gemm in products.items():
        assert gemm.operands == ["FP4E2M1", "FP8"], name
        assert sorted(gemm.constants) == FP4_WEIGHT, name
    (head,) = [gemm for gemm in build.gemms if "/lm_head/MatMul" in gemm.nodes]
    assert not {"FP4E2M1", "FP8"} & {*head.operands, *head.constants}


def test_a_gpu_without_fp4_is_refused(decoder: Path) -> None:
    build = build_engine(decoder, "SM89")
    assert build.engine_bytes == 0
    assert any("HW-specific datatypes: fp4_e2m1" in error for error in build.errors)
