"""A vision encoder without scoring and gather against the one with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qavp_export import pipeline
from qavp_export.bench.scoring import measure_scoring, write_without_scoring
from qavp_export.engines import EngineOptions
from qavp_export.engines.ort.cpu import cpu_graphs
from qavp_export.engines.ort.session import value
from qavp_export.errors import UnavailableError
from qavp_export.recipe import make_recipe

OPTIONS = EngineOptions(threads=1)
PIXELS = np.random.default_rng(0).standard_normal((1, 3, 40, 40)).astype(np.float32)


def export(model: Path, target: Path, keep: float) -> Path:
    recipe = make_recipe("rtn", {"keep": keep})
    pipeline.export(model, recipe, target, name="tiny", force=False, progress=lambda *_: None)
    return target


@pytest.fixture(scope="module")
def pruned(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_llava, tmp_path_factory.mktemp("pruned") / "bundle", 0.2)


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_what_is_cut_off_is_scoring_and_gather_alone(pruned: Path, tmp_path: Path, precision: str) -> None:
    write_without_scoring(pruned, "engines/ort-cpu", tmp_path / "cut")
    inputs = {"pixel_values": value(PIXELS, np.float32)}
    whole = cpu_graphs(pruned, OPTIONS).vision(precision).run(inputs)
    cut = cpu_graphs(tmp_path / "cut", OPTIONS).vision(precision).run(inputs)
    features = cut["image_features"].numpy()
    kept = whole["kept_indices"].numpy()[0]
    assert features.shape[1] == 25
    assert len(kept) == 5
    # The same operators on the same numbers; only what ONNX Runtime fuses across the cut may round otherwise.
    np.testing.assert_allclose(features[:, kept], whole["image_features"].numpy(), rtol=1e-5, atol=1e-6)


def test_both_are_run_as_often(pruned: Path) -> None:
    whole, without = measure_scoring(pruned, "ort-cpu", OPTIONS, {"pixel_values": PIXELS}, 3)
    assert len(whole) == len(without) >= 3
    assert min(*whole, *without) > 0


def test_where_all_tokens_are_kept_nothing_is_scored(tiny_llava: Path, tmp_path: Path) -> None:
    bundle = export(tiny_llava, tmp_path / "bundle", 1.0)
    with pytest.raises(UnavailableError, match="all tokens are kept"):
        measure_scoring(bundle, "ort-cpu", OPTIONS, {"pixel_values": PIXELS}, 2)


def test_a_serialized_engine_is_not_cut(pruned: Path) -> None:
    with pytest.raises(UnavailableError, match="tensorrt runs the vision encoder whole"):
        measure_scoring(pruned, "tensorrt", OPTIONS, {"pixel_values": PIXELS}, 2)
