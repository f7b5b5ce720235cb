"""HybridTokenScore and SelectGather against the NumPy reference, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qavp_export.errors import GraphError, InputError
from qavp_export.numerics.score import ScoreInput, hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import norm_relevance, random_relevance
from qavp_export.passes import InsertHybridScore, SelectGather, functions, set_score_weights
from qavp_export.passes.hybrid_score import SCORE
from tests.passes.graphs import Array, graph, op_types, run, session

# Tokens, channels, group size, tokens kept: powers of two, odd sizes, a single token, everything kept.
SIZES = [(16, 64, 16, 4), (25, 96, 32, 3), (9, 35, 7, 9), (7, 18, 6, 2), (1, 16, 16, 1), (31, 128, 128, 8)]


def _duplicates(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    v = rng.standard_normal(shape).astype(np.float32)
    return v[:, rng.integers(0, max(1, shape[1] // 3), shape[1])]


def _near_ties(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Tokens that differ in the last bits only: a sum taken in another order would reorder them."""
    base = np.broadcast_to(rng.standard_normal((1, 1, shape[2])), shape).astype(np.float32)
    return np.nextafter(base, np.float32(10) * rng.integers(-1, 2, shape).astype(np.float32))


def _outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    v = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 0.02, v * 1e14, v).astype(np.float32)


def _half_range(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """float16's whole range, its largest and its subnormal numbers included."""
    v = (rng.choice([-1, 1], shape) * 2.0 ** rng.uniform(-24, 16, shape)).clip(-65504, 65504)
    return v.astype(np.float16).astype(np.float32)


def _half_way(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Scale 1 and values exactly between two codes."""
    v = rng.integers(-6, 7, shape) + 0.5
    v[..., 0] = 7
    return v.astype(np.float32)


Generator = Callable[[np.random.Generator, tuple[int, ...]], Array]
KINDS: dict[str, Generator] = {
    "normal": lambda rng, shape: rng.standard_normal(shape).astype(np.float32),
    "constant tokens": lambda rng, shape: np.full(shape, rng.standard_normal(), np.float32),
    "duplicate tokens": _duplicates,
    "near-ties": _near_ties,
    "all zeros": lambda _, shape: np.zeros(shape, np.float32),
    "zero tokens": lambda rng, shape: (rng.standard_normal(shape) * rng.integers(0, 2, (*shape[:2], 1))).astype(
        np.float32
    ),
    "huge outliers": _outliers,
    "float16 range": _half_range,
    "half-way codes": _half_way,
    "subnormal": lambda rng, shape: (rng.standard_normal(shape) * 1e-39).astype(np.float32),
}


def _scoring_graph(
    size: tuple[int, int, int, int],
    score_input: ScoreInput,
    alpha: float,
    features: str = "float",
    outlier_weight: float = 0.5,
) -> ir.Model:
    """The function node alone, with the semantic relevance as a graph input, and the selection behind it."""
    tokens, width, group_size, kept = size
    model = graph(
        f"({features}[B,{tokens},{width}] features, float[B,{tokens}] semantic)"
        f" => ({features}[B,{tokens},{width}] image_features, float[B,{tokens}] score)",
        "image_features = Identity (features)",
    )
    node = ir.node(
        "HybridTokenScore",
        [model.graph[0].outputs[0], model.graph.inputs[1]],
        {
            "group_size": group_size,
            "alpha": alpha,
            "outlier_weight": outlier_weight,
            "plugin_namespace": "qavp",
            "plugin_version": "1",
            "aot": 1,
        },
        domain="qavp",
        outputs=[model.graph.outputs[1]],
    )
    model.graph.append(node)
    functions.add_function(model, functions.hybrid_token_score(width, 23, score_input))
    assert SelectGather(score="score", tokens=kept)(model).matched == 1
    return model


@pytest.mark.parametrize("optimize", [False, True], ids=["as written", "optimized"])
@pytest.mark.parametrize("score_input", ["raw", "rms"])
def test_graph_equals_reference_on_200_inputs(score_input: ScoreInput, optimize: bool) -> None:
    """Scores and kept indices equal bit for bit, so near-ties need no exception."""
    # (alpha, outlier_weight)
    weights = [(0.5, 0.5), (0.3, 0.0), (0.0, 0.25), (1.0, 1.0), (0.5, 0.5), (0.7, 1.0)]
    sessions = [
        session(_scoring_graph(size, score_input, alpha, outlier_weight=mix), optimize=optimize)
        for size, (alpha, mix) in zip(SIZES, weights, strict=True)
    ]
    names = list(KINDS)
    for seed in range(200):
        case, kind = seed % len(SIZES), names[seed // len(SIZES) % len(names)]
        (tokens, width, group_size, kept), (alpha, mix) = SIZES[case], weights[case]
        rng = np.random.default_rng(seed)
        features = KINDS[kind](rng, (2, tokens, width))
        # Every third input has ties in the semantic relevance as well.
        semantic = rng.random((2, tokens), dtype=np.float32)
        semantic = np.round(semantic * 2) if seed % 3 == 0 else semantic
        expected = hybrid_token_score(
            features, semantic, group_size=group_size, alpha=alpha, score_input=score_input, outlier_weight=mix
        )
        indices = select_topk(expected, kept)
        gathered, score, chosen = sessions[case].run(None, {"features": features, "semantic": semantic})
        where = f"seed {seed}, {kind}"
        np.testing.assert_array_equal(score, expected, err_msg=where)
        np.testing.assert_array_equal(chosen, indices, err_msg=where)
        np.testing.assert_array_equal(gathered, features[np.arange(2)[:, np.newaxis], indices], err_msg=where)


@pytest.mark.parametrize("optimize", [False, True])
def test_float16_features_are_scored_in_float32(optimize: bool) -> None:
    size = (16, 64, 32, 5)
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((2, 16, 64)) * 1e4).astype(np.float16)
    semantic = rng.random((2, 16), dtype=np.float32)
    model = _scoring_graph(size, "raw", 0.5, "float16")
    feeds = {"features": features, "semantic": semantic}
    gathered, score, indices = run(model, feeds, optimize=optimize)
    expected = hybrid_token_score(features, semantic, group_size=32)
    np.testing.assert_array_equal(score, expected)
    np.testing.assert_array_equal(indices, select_topk(expected, 5))
    assert gathered.dtype == np.float16


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_broken_image_leaves_the_others_of_its_batch_alone(bad: float) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 16, 64)).astype(np.float32)
    features[0, 3, 5] = bad
    semantic = rng.random((2, 16), dtype=np.float32)
    model = _scoring_graph((16, 64, 32, 5), "raw", 0.5)
    _, score, indices = run(model, {"features": features, "semantic": semantic})
    expected = hybrid_token_score(features[1:], semantic[1:], group_size=32)
    np.testing.assert_array_equal(score[1:], expected)
    np.testing.assert_array_equal(indices[1:], select_topk(expected, 5))
    # Whatever is kept of the broken one, it is k valid tokens in raster order.
    assert ((np.diff(indices[0]) > 0) & (indices[0, 1:] < 16)).all()


def test_bfloat16_features_are_scored_in_float32() -> None:
    model = graph(
        "(float[B,9,32] x) => (float[B,9,32] y)",
        "image_features = Cast <to: int = 16> (x) y = Cast <to: int = 1> (image_features)",
    )
    InsertHybridScore(semantic="norm", alpha=0.0)(model)
    model.graph.outputs.append(_value(model, SCORE))
    x = np.random.default_rng(0).standard_normal((1, 9, 32)).astype(np.float32)
    rounded, score = run(model, {"x": x})
    expected = hybrid_token_score(rounded, np.zeros((1, 9), np.float32), group_size=32, alpha=0.0)
    np.testing.assert_array_equal(score, expected)


def _features_graph(opset: int = 23, tokens: int | str = 12, width: int | str = 48) -> ir.Model:
    return graph(
        f"(float[B,{tokens},{width}] x) => (float[B,{tokens},{width}] image_features)",
        "image_features = Identity (x)",
        opset=opset,
    )


def _value(model: ir.Model, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(model.graph)[name]


@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.parametrize("scorer", ["norm", "random"])
def test_scorers_that_need_no_attention(scorer: str, opset: int) -> None:
    model = _features_graph(opset)
    result = InsertHybridScore(semantic=scorer, seed=3)(model)  # type: ignore[arg-type]
    assert (result.matched, result.refused, result.modified) == (1, [], True)
    model.graph.outputs.append(_value(model, SCORE))
    x = np.random.default_rng(0).standard_normal((3, 12, 48)).astype(np.float32)
    relevance = norm_relevance(x) if scorer == "norm" else np.tile(random_relevance(3, 12), (3, 1))
    for optimize in (False, True):
        _, score = run(model, {"x": x}, optimize=optimize)
        # The default group size of 48 channels is 16.
        np.testing.assert_array_equal(score, hybrid_token_score(x, relevance, group_size=16))


def test_score_is_one_function_node_that_a_plugin_can_replace() -> None:
    model = _features_graph()
    InsertHybridScore(semantic="norm", alpha=0.25, score_input="rms", group_size=24, outlier_weight=0.75)(model)
    node = model.graph[-1]
    assert (node.domain, node.op_type) == ("qavp", "HybridTokenScore")
    assert node.name == "/prune/score/HybridTokenScore"
    assert {name: attr.value for name, attr in node.attributes.items()} == {
        "group_size": 24,
        "alpha": 0.25,
        "outlier_weight": 0.75,
        "score_input": "rms",
        "plugin_namespace": "qavp",
        "plugin_version": "1",
        "aot": 1,
    }
    assert op_types(model) == ["Identity", "TokenNorm", "HybridTokenScore"]
    body = model.functions["qavp", "HybridTokenScore", ""]
    assert {inner.domain for inner in body} == {""}
    assert body.opset_imports == {"": 23}


def test_new_values_have_types_and_shapes() -> None:
    model = _features_graph()
    InsertHybridScore(semantic="random")(model)
    SelectGather(keep=0.25)(model)
    new = [node for node in model.graph if node.op_type != "Identity"]
    assert all(str(node.name).startswith("/prune/") for node in new)
    for node in new:
        for value in node.outputs:
            # TopK's values are not used.
            assert (value.dtype is not None and value.shape is not None) or not value.uses(), value.name
    assert str(_value(model, SCORE).shape) == "[B,12]"


def test_inference_fills_in_a_missing_shape() -> None:
    model = _features_graph()
    model.graph.outputs[0].shape = None
    assert InsertHybridScore(semantic="norm")(model).matched == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_features_graph(17), "uses opset 17; opset 18 or newer is needed"),
        (_features_graph(width="D"), r"has shape \[B,12,D\]: D must be a number"),
        (_features_graph(width=20), "divides all channel counts .20."),
        (
            graph("(float[B,4] x) => (float[B,4] image_features)", "image_features = Neg (x)"),
            r"are \[B,N,D\]",
        ),
        (graph("(float[B,4,16] x) => (float[B,4,16] y)", "y = Neg (x)"), "no value named 'image_features'"),
        (
            graph("(float[B,4,16] x) => (int64[B,4,16] image_features)", "image_features = Cast <to = 7> (x)"),
            "has type INT64",
        ),
    ],
)
def test_unsuitable_graphs_are_refused_and_unchanged(model: ir.Model, message: str) -> None:
    before = op_types(model)
    with pytest.raises(InputError, match=message) as caught:
        InsertHybridScore(semantic="norm")(model)
    assert "\n" not in str(caught.value)
    assert op_types(model) == before
    assert not model.functions


def test_scoring_twice_is_refused() -> None:
    model = _features_graph()
    InsertHybridScore(semantic="norm")(model)
    with pytest.raises(GraphError, match="was it pruned before"):
        InsertHybridScore(semantic="norm")(model)


def test_weights_can_be_set_later() -> None:
    model, later = _features_graph(), _features_graph()
    InsertHybridScore(semantic="norm", alpha=0.25, outlier_weight=0.75)(model)
    InsertHybridScore(semantic="norm")(later)
    set_score_weights(later, 0.25, 0.75)
    assert ir.to_proto(later).SerializeToString(deterministic=True) == ir.to_proto(model).SerializeToString(
        deterministic=True
    )
    with pytest.raises(InputError, match="outlier_weight is 2"):
        set_score_weights(later, 0.5, 2.0)
    with pytest.raises(GraphError, match="has no value named"):
        set_score_weights(_features_graph(), 0.5, 0.5)


def test_another_function_of_the_same_name_is_refused() -> None:
    model = _features_graph()
    functions.add_function(model, functions.hybrid_token_score(64, 23, "raw"))
    with pytest.raises(GraphError, match=r"already has a function qavp\.HybridTokenScore"):
        InsertHybridScore(semantic="norm")(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"semantic": "clip"}, "semantic is 'clip'"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"outlier_weight": 1.5}, "outlier_weight is 1.5"),
        ({"group_size": 0}, "group_size 0"),
        ({"score_input": "l2"}, "score_input is 'l2'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_refused_without_a_graph(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        InsertHybridScore(**settings)  # type: ignore[arg-type]
