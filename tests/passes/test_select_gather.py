"""SelectGather on graphs of two or three nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qavp_export.errors import GraphError, InputError
from qavp_export.passes import Refusal, SelectGather
from tests.passes.graphs import graph, op_types, run

SIGNATURE = "(float[B,6,4] x, float[B,6] score) => (float[B,6,4] image_features)"
TIES = np.array([[1, 3, 2, 3, 2, 2], [0, 0, 0, 0, 0, 0]], np.float32)


def _model() -> ir.Model:
    return graph(SIGNATURE, "image_features = Neg (x)")


def _features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)


@pytest.mark.parametrize("optimize", [False, True])
def test_keeps_the_best_in_raster_order_and_ties_go_to_the_lower_index(optimize: bool) -> None:
    model = _model()
    result = SelectGather(score="score", keep=0.5)(model)
    assert (result.matched, result.refused) == (1, [])
    assert [output.name for output in model.graph.outputs] == ["image_features", "kept_indices"]
    assert [str(output.shape) for output in model.graph.outputs] == ["[B,3,4]", "[B,3]"]
    x = _features()
    features, indices = run(model, {"x": x, "score": TIES}, optimize=optimize)
    np.testing.assert_array_equal(indices, [[1, 2, 3], [0, 1, 2]])
    np.testing.assert_array_equal(features, -np.stack([x[0, [1, 2, 3]], x[1, [0, 1, 2]]]))


def test_keeping_all_tokens_is_the_identity() -> None:
    model = _model()
    SelectGather(score="score", tokens=6)(model)
    x = _features()
    features, indices = run(model, {"x": x, "score": TIES})
    np.testing.assert_array_equal(indices, [range(6)] * 2)
    np.testing.assert_array_equal(features, -x)


def test_node_names_are_readable() -> None:
    model = _model()
    SelectGather(score="score", tokens=2)(model)
    names = [node.name for node in model.graph if node.op_type not in ("Constant", "Neg")]
    assert names == [f"/prune/select/{name}" for name in ("TopK", "Sort", "Unsqueeze", "GatherND")]


def test_consumers_get_the_kept_tokens_and_the_score_keeps_reading_all() -> None:
    model = graph(
        "(float[B,6,4] x) => (float[B,6,4] y)",
        # `y` stands in front of the score: the pass has to reorder.
        "mid = Neg (x) y = Abs (mid) last = Constant <value_ints: ints = [-1]> ()"
        "score = ReduceMax <keepdims: int = 0> (mid, last)",
    )
    SelectGather(at="mid", score="score", tokens=2)(model)
    y, score = model.graph.outputs[0], ir.convenience.create_value_mapping(model.graph)["score"]
    assert str(y.shape) == "[B,2,4]"
    assert str(score.shape) == "[B,6]"
    x = _features()
    kept, indices = run(model, {"x": x})
    expected = np.sort(np.argsort(-(-x).max(axis=-1), axis=-1, kind="stable")[:, :2], axis=-1)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(kept, np.abs(x[np.arange(2)[:, np.newaxis], expected]))


def test_another_output_of_all_tokens_is_reported() -> None:
    model = graph(
        "(float[B,6,4] x, float[B,6] score) => (float[B,6,4] image_features, float[B,6,4] hidden, float[B,6,4] y)",
        "[tower] hidden = Abs (x) image_features = Neg (hidden) y = Neg (image_features)",
    )
    result = SelectGather(score="score", tokens=2)(model)
    reason = "output 'hidden' keeps its 6 tokens: it does not depend on 'image_features'"
    assert result.refused == [Refusal("tower", reason)]
    assert [str(output.shape) for output in model.graph.outputs] == ["[B,2,4]", "[B,6,4]", "[B,2,4]", "[B,2]"]


def test_features_may_be_a_graph_input() -> None:
    model = graph("(float[B,6,4] x, float[B,6] score) => (float[B,6,4] y)", "y = Neg (x)")
    SelectGather(at="x", score="score", tokens=2)(model)
    x = _features()
    y, indices = run(model, {"x": x, "score": TIES})
    np.testing.assert_array_equal(indices, [[1, 3], [0, 1]])
    np.testing.assert_array_equal(y, -np.stack([x[0, [1, 3]], x[1, [0, 1]]]))


def test_a_consumer_fixed_to_all_tokens_is_refused() -> None:
    model = graph(
        "(float[B,6,4] x, float[B,6] score) => (float[B,3,8] y)",
        "image_features = Neg (x) shape = Constant <value_ints: ints = [-1, 6, 2, 2]> ()"
        "[fold] y = Reshape (image_features, shape)",
    )
    before = op_types(model)
    with pytest.raises(GraphError, match="Reshape 'fold' behind 'image_features' is fixed"):
        SelectGather(score="score", tokens=2)(model)
    assert op_types(model) == before


def test_selecting_twice_is_refused() -> None:
    model = _model()
    SelectGather(score="score", tokens=2)(model)
    with pytest.raises(GraphError, match="was it pruned before"):
        SelectGather(score="score", tokens=1)(model)


def test_more_tokens_than_there_are_is_refused() -> None:
    model = _model()
    with pytest.raises(InputError, match="tokens is 7, but 'image_features' has 6"):
        SelectGather(score="score", tokens=7)(model)
    assert op_types(model) == ["Neg"]


def test_a_missing_score_is_refused() -> None:
    with pytest.raises(GraphError, match="no value named 'relevance'"):
        SelectGather(score="relevance", tokens=2)(_model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either keep or tokens"),
        ({"keep": 0.5, "tokens": 2}, "give either keep or tokens"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 2, "select": "best"}, "select is 'best'"),
    ],
)
def test_bad_settings_are_refused_without_a_graph(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SelectGather(**settings)  # type: ignore[arg-type]
