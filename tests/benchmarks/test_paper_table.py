"""The paper's table: its decoders with shared scales, its cells against a real bundle, and what its report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
from onnx import TensorProto, helper, numpy_helper
from paper_regimes import REGIMES, write_graph
from paper_report import Subject, figures, holm, pooled, semantic_baseline
from paper_sweep import Cell, Outcome, Questions, Ranking, Score, Study, cells
from paper_table import app

from qavp_export.cli.common import run_command
from qavp_export.engines import EngineOptions
from qavp_export.engines.ort.session import session_options
from qavp_export.evaluate.bundles import Bundles
from qavp_export.evaluate.datasets import DataSet, Item
from qavp_export.numerics.one_level import quantize_one_level
from qavp_export.numerics.rotation import residual_rotation
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.passes.place_qdq import PlaceQdq
from qavp_export.passes.quantizer import RoundWeights
from qavp_export.passes.scheme import Scheme
from qavp_export.runtime import QavpModel

Float32 = npt.NDArray[np.float32]

GROUP = 16
# float32 sums over 48 channels of values of about 1: 1e-6 is usual.
ROUNDING = 1e-5
PROMPTS = ("what is the color", "is a circle left of the circle ?", "what", "the color of w20 w21 w22 ?", "is right")


@pytest.fixture(scope="module")
def linear() -> tuple[Float32, Float32]:
    """Activations `[2,5,48]`, one token far louder than others, and a weight `[48,7]`."""
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((2, 5, 48)).astype(np.float32), rng.standard_normal((48, 7)).astype(np.float32)
    x[0, 2] *= 9
    return x, weight


@pytest.fixture(scope="module")
def canonical(linear: tuple[Float32, Float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quantized linear layer, as the pass writes it."""
    _, weight = linear
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="linear")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 7])],
        [numpy_helper.from_array(weight, "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model = ir.serde.deserialize_model(made)
    scheme = Scheme("int4", "int4", "one-level")
    assert PlaceQdq(GROUP, [("*", scheme)], RoundWeights(clip_search=False))(model).matched == 1
    path = tmp_path_factory.mktemp("linear") / "model.onnx"
    ir.save(model, path)
    return path


def _rounded(weight: Float32) -> Float32:
    return quantize_one_level(np.ascontiguousarray(weight.T), GROUP, 4).dequantize().T


def _run(path: Path, feeds: dict[str, Any], outputs: list[str]) -> list[Any]:
    # As the engine opens it: by default ONNX Runtime rounds activations in front of 4-bit weights to 8 bits.
    options = session_options(EngineOptions(threads=1))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(outputs, feeds))


def test_static_scales_are_inputs(canonical: Path, linear: tuple[Float32, Float32]) -> None:
    x, weight = linear
    path, (name,) = write_graph(canonical, canonical.with_name("static.onnx"), "static")
    scale = np.array(0.31, np.float32)  # clips the loud token
    (found,) = _run(path, {"x": x, name: scale}, ["y"])
    codes = np.clip(np.rint(x / scale), -8, 7)
    assert codes.min() == -8
    assert codes.max() == 7
    np.testing.assert_allclose(found, (codes * scale) @ _rounded(weight), atol=20 * ROUNDING)


def test_dynamic_scales_are_those_of_the_loudest_token(canonical: Path, linear: tuple[Float32, Float32]) -> None:
    x, weight = linear
    path, names = write_graph(canonical, canonical.with_name("dynamic.onnx"), "dynamic")
    assert names == []
    (found,) = _run(path, {"x": x}, ["y"])
    scale = np.abs(x).max(axis=(1, 2), keepdims=True) / np.float32(7)
    np.testing.assert_allclose(found, (np.rint(x / scale) * scale) @ _rounded(weight), atol=20 * ROUNDING)
    # What the regimes differ in: without its loudest token the others of a prompt get other codes, or do not.
    quiet = np.delete(x, 2, axis=1)
    (shared,) = _run(path, {"x": quiet}, ["y"])
    assert np.abs(shared[0] - np.delete(found[0], 2, axis=0)).max() > 0.1
    (before,), (after,) = _run(canonical, {"x": x}, ["y"]), _run(canonical, {"x": quiet}, ["y"])
    np.testing.assert_allclose(after, np.delete(before, 2, axis=1), atol=ROUNDING)


def test_observing_rounds_no_activation(canonical: Path, linear: tuple[Float32, Float32]) -> None:
    x, weight = linear
    path, (name,) = write_graph(canonical, canonical.with_name("observe.onnx"), "observe")
    found, largest = _run(path, {"x": x}, ["y", name])
    np.testing.assert_allclose(found, x @ _rounded(weight), atol=20 * ROUNDING)
    assert largest == np.abs(x).max()
    onnx.checker.check_model(path)


@pytest.fixture(scope="module")
def data() -> DataSet:
    rng = np.random.default_rng(5)
    items = [
        Item(str(number), rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), text, ("left",), "ab"[number % 2])
        for number, text in enumerate(PROMPTS)
    ]
    return DataSet("made up", tuple(items), "exact")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def study(tiny_llava: Path, work: Path, data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(
        Bundles(tiny_llava, "tiny", work),
        ["two-level", "static"],
        data,
        data.items[:3],
        tmp_path_factory.mktemp("graphs"),
        options=EngineOptions(threads=1),
        batch=2,
        max_new_tokens=5,
        progress=lambda *_: None,
    )


def test_a_cell_answers_as_the_bundle_of_its_recipe(study: Study, work: Path, data: DataSet) -> None:
    cell = Cell("two-level", "topk", "raw", alpha=0.5, keep=0.125)
    model = QavpModel.from_bundle(work / study.identity["two-level"], "ort-reference", EngineOptions(threads=1))
    assert model.manifest.recipe["alpha"] == 0.5
    assert model.manifest.vision_tokens.after == 3
    truth = model.generate([item.image for item in data.items], list(PROMPTS), max_new_tokens=5)
    assert len(set(truth)) > 1
    assert study.answers(cell) == [text.strip() for text in truth]


def test_static_scales_follow_what_is_kept(study: Study) -> None:
    few = study.measure(Cell("static", alpha=1.0, keep=0.125)).scales
    every = study.measure(Cell("static")).scales
    # More tokens, no smaller largest value in the first layer, whose inputs do not depend on other tokens.
    assert every[0] >= few[0]
    assert not np.array_equal(every, few)
    assert study.measure(Cell("two-level", "topk", "random", keep=0.2, seeds=3)).scores.shape == (3, len(PROMPTS))


def test_scores_of_other_inputs() -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((3, 30, 64)).astype(np.float32)
    features[:, 4, 7] = 40.0  # an outlier channel, which the rotation spreads
    features[:, 9] *= 20  # a token of a large norm, which a rotation keeps
    semantic = rng.random((3, 30)).astype(np.float32)
    ranking = Ranking(Questions((), [np.zeros(1, np.int64)] * 3, (), features, semantic), 32, seed=6)

    def kept(score: Score, draw: int = 0) -> list[list[int]]:
        return ranking.kept(Cell("full", score=score, alpha=0.3, keep=0.2), draw).tolist()  # type: ignore[no-any-return]

    turned = (features @ residual_rotation(64, 6).matrix()).astype(np.float32)
    normalised = features / np.sqrt(np.square(features).mean(axis=-1, keepdims=True))
    for score, seen in (("raw", features), ("rotated", turned), ("rms", normalised)):
        expected = select_topk(hybrid_token_score(seen, semantic, group_size=32, alpha=0.3), 6)
        assert kept(score) == expected.tolist()
    assert kept("raw") != kept("rotated") != kept("rms")
    assert kept("random") == kept("random") != kept("random", draw=1)
    assert kept("flat") == [list(range(6))] * 3


def test_every_cell_has_its_baseline() -> None:
    found = cells(list(REGIMES), [0.0, 0.5, 1.0], [0.125, 0.25])
    assert len({cell.name for cell in found}) == len(found)
    assert all(semantic_baseline(cell) in found for cell in found if cell.keep < 1)


def _subject(name: str, ours: list[float], theirs: list[float]) -> Subject:
    def outcome(scores: list[float], scales: list[float]) -> Outcome:
        return Outcome(np.array([scores]), np.array(scales, np.float32))

    base = Cell("static", alpha=1.0, keep=0.125)
    outcomes = {base: outcome(theirs, [1.0, 4.0]), Cell("static", alpha=0.5, keep=0.125): outcome(ours, [2.0, 8.0])}
    return Subject(name, "made up", "exact", ["a", "b", "a", "b"], 16, outcomes)


def test_figures_and_differences() -> None:
    one, two = _subject("one", [1, 1, 1, 0], [1, 0, 0, 0]), _subject("two", [0, 1, 1, 0], [1, 1, 1, 1])
    base, row = figures(one, seed=0)
    assert "against_semantic" not in base
    assert row["accuracy"]["estimate"] == 0.75
    assert row["by_type"] == {"a": 1.0, "b": 0.5}
    assert row["against_semantic"]["estimate"] == 0.5
    assert row["against_semantic"]["mcnemar"] == {"only_a": 2, "only_b": 0, "p": 0.5}
    assert row["scales_to_semantic"] == pytest.approx(2.0)
    (both,) = pooled([one, two], seed=0)
    assert both["by_subject"] == [0.5, -0.5]
    assert both["against_semantic"]["estimate"] == 0
    assert pooled([one], seed=0) == []


def test_the_gain_that_full_precision_does_not_have() -> None:
    scores = {("full", 1.0): [1, 0, 0, 1], ("full", 0.5): [1, 0, 1, 1], ("static", 1.0): [0, 0, 0, 1]}
    scores[("static", 0.5)] = [1, 1, 1, 1]
    none = np.zeros(0, np.float32)
    outcomes = {
        Cell(regime, alpha=alpha, keep=0.125): Outcome(np.array([found], np.float64), none)
        for (regime, alpha), found in scores.items()
    }
    rows = figures(Subject("one", "made up", "exact", ["a"] * 4, 16, outcomes), seed=0)
    # By question: static gains 1, 1, 1, 0, full precision 0, 0, 1, 0.
    assert [row["gain_beyond_full"]["estimate"] for row in rows if "gain_beyond_full" in row] == [0.5]


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1; no value below one before it.
    assert holm([0.02, 0.04, 0.01]) == pytest.approx([0.04, 0.04, 0.03])


def test_the_command_goes_on_where_it_was(
    tiny_llava: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"
    arguments = [f"tiny={tiny_llava}:demo", "--questions", "3", "--calibration", "2", "--keeps", "0.2"]
    arguments += ["--alphas", "0.5", "--max-new-tokens", "1", "--threads", "1", "--json", str(file)]
    arguments += ["--work", str(work), "--charts", str(tmp_path / "charts")]
    assert run_command(app, "paper_table", [*arguments, "--regimes", "two-level"]) == 0
    first = json.loads(file.read_text())
    assert "topk rotated alpha 0.5" in capsys.readouterr().out
    assert (tmp_path / "charts" / "tiny-alpha.png").read_bytes().startswith(b"\x89PNG")
    assert len(first["subjects"]["tiny"]["cells"]) == len(first["subjects"]["tiny"]["figures"]) == 11

    measured = []
    original = Study.measure

    def measure(self: Study, cell: Cell) -> Outcome:
        measured.append(cell.regime)
        return original(self, cell)

    monkeypatch.setattr(Study, "measure", measure)
    assert run_command(app, "paper_table", [*arguments, "--regimes", "two-level,static"]) == 0
    assert set(measured) == {"static"}
    arguments[2] = "4"
    assert run_command(app, "paper_table", arguments) == 2
    assert "other settings" in capsys.readouterr().err
