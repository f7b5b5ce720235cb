"""Pruning where the number of tokens varies and k is an input: one graph, several N and k, against the reference."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from qavp_export.errors import GraphError, InputError
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import cls_relevance, norm_relevance, random_relevance, received_relevance
from qavp_export.passes import KeepAllTokens, PruneVisionTokens, SelectGather
from tests.passes.graphs import Array, graph, op_types, run
from tests.passes.test_attention_scorers import FUSED_3D, FUSED_4D, MULTI_HEAD, OPEN

HEADS, SIZE, WIDTH = 3, 16, 48
CASES = [(9, 4), (9, 9), (23, 4), (23, 1)]


def _check(outputs: list[Array], features: Array, score: Array, kept: int) -> None:
    gathered, indices = outputs
    np.testing.assert_array_equal(indices, select_topk(score, kept))
    np.testing.assert_array_equal(gathered, np.take_along_axis(features, indices[..., np.newaxis], axis=1))


@pytest.mark.parametrize("optimize", [False, True], ids=["as written", "optimized"])
@pytest.mark.parametrize("scorer", ["norm", "random"])
def test_one_graph_serves_several_sizes_and_budgets(scorer: str, optimize: bool) -> None:
    model = graph("(float[B,N,48] x) => (float[B,N,48] image_features)", "image_features = Neg (x)")
    PruneVisionTokens(keep_input=True, semantic=scorer, seed=5)(model)  # type: ignore[arg-type]
    assert [(value.name, str(value.shape)) for value in model.graph.inputs] == [
        ("x", "[B,N,48]"),
        ("keep_tokens", "[1]"),
    ]
    assert [str(value.shape) for value in model.graph.outputs] == ["[B,kept,48]", "[B,kept]"]
    for count, kept in CASES:
        x = np.random.default_rng(count).standard_normal((2, count, WIDTH)).astype(np.float32)
        relevance = norm_relevance(x) if scorer == "norm" else np.tile(random_relevance(5, count), (2, 1))
        outputs = run(model, {"x": x, "keep_tokens": np.array([kept])}, optimize=optimize)
        # 48 channels in groups of 16: bit for bit, as with a static grid.
        _check(list(outputs), -x, hybrid_token_score(-x, relevance, group_size=16), kept)


@pytest.mark.parametrize("optimize", [False, True], ids=["as written", "optimized"])
@pytest.mark.parametrize(
    "attention", [FUSED_4D, FUSED_3D, MULTI_HEAD, OPEN], ids=["4-D", "3-D", "MultiHead", "Softmax"]
)
def test_a_tower_of_varying_size_is_scored_by_what_patches_receive(attention: str, optimize: bool) -> None:
    model, unpruned = _varying(attention), _varying(attention)
    PruneVisionTokens(keep_input=True, semantic="received", group_size=16)(model)
    KeepAllTokens()(unpruned)
    for count, kept in CASES:
        rng = np.random.default_rng(count)
        feeds = {name: rng.standard_normal((1, HEADS, count, SIZE)).astype(np.float32) for name in "qkv"}
        features, _ = run(unpruned, feeds, optimize=optimize)
        # The default scale of 3-D attention is 1 / sqrt(16).
        relevance = received_relevance(feeds["q"], feeds["k"], 0.4 if attention in (FUSED_4D, OPEN) else 0.25)
        score = hybrid_token_score(features, relevance, group_size=16)
        ranked = np.sort(score, axis=-1)[:, ::-1]
        # exp and matrix products round freely, scores to 1e-5; no tie at the cut is closer than that.
        assert kept == count or (ranked[:, kept - 1] - ranked[:, kept]).min() > 1e-4
        outputs = run(model, {**feeds, "keep_tokens": np.array([kept])}, optimize=optimize)
        _check(list(outputs), features, score, kept)


def _varying(attention: str) -> ir.Model:
    shape = f"float[1,{HEADS},P,{SIZE}]"
    body = attention + "image_features = Identity (mixed)"
    model = graph(f"({shape} q, {shape} k, {shape} v) => (float[1,N,{WIDTH}] image_features)", body)
    if "com.microsoft" in attention:
        # ONNX knows no shape of other domains.
        mixed = ir.convenience.create_value_mapping(model.graph)["mixed"]
        mixed.dtype, mixed.shape = ir.DataType.FLOAT, ir.Shape([1, "P", WIDTH])
    return model


# Tiles of 10 patches and a [CLS], of which a call picks rows: what the packed families do.
PICKED = f"""
    zero = Constant <value_ints: ints = [0]> () one = Constant <value_ints: ints = [1]> ()
    end = Constant <value_ints: ints = [1000]> () patches = Slice (mixed, one, end, one)
    all_rows = Constant <value_ints: ints = [-1, {WIDTH}]> () rows = Reshape (patches, all_rows)
    taken = Gather (rows, picks) image_features = Unsqueeze (taken, zero)
    all_relevance = Constant <value_ints: ints = [-1]> () flat_relevance = Reshape (patch_relevance, all_relevance)
    taken_relevance = Gather (flat_relevance, picks) token_relevance = Unsqueeze (taken_relevance, zero)
"""


def _picking(attention: str = FUSED_4D, patches: int | str = 10) -> ir.Model:
    shape = f"float[T,{HEADS},11,{SIZE}]"
    return graph(
        f"({shape} q, {shape} k, {shape} v, int64[N] picks, float[T,{patches}] patch_relevance)"
        f" => (float[1,N,{WIDTH}] image_features, float[1,N] token_relevance)",
        attention + PICKED,
    )


@pytest.mark.parametrize("attention", [FUSED_4D, OPEN], ids=["fused", "Softmax"])
@pytest.mark.parametrize("scorer", ["cls", "received"])
def test_relevance_of_patches_goes_the_way_of_the_features(scorer: str, attention: str) -> None:
    model, unpruned = _picking(attention), _picking(attention)
    PruneVisionTokens(keep_input=True, semantic=scorer, group_size=16)(model)  # type: ignore[arg-type]
    KeepAllTokens()(unpruned)
    assert [value.name for value in model.graph.inputs] == ["q", "k", "v", "picks", "keep_tokens"]
    assert [value.name for value in model.graph.outputs] == ["image_features", "kept_indices"]
    for tiles, kept in [(2, 5), (2, 2), (5, 5)]:
        rng = np.random.default_rng(tiles)
        feeds = {name: rng.standard_normal((tiles, HEADS, 11, SIZE)).astype(np.float32) for name in "qkv"}
        picks = rng.permutation(10 * tiles)[: 6 * tiles]
        features, everything = run(unpruned, {**feeds, "picks": picks})
        np.testing.assert_array_equal(everything, [range(6 * tiles)])
        if scorer == "cls":
            relevance = cls_relevance(feeds["q"], feeds["k"], 0.4)
        else:
            relevance = received_relevance(feeds["q"], feeds["k"], 0.4, prefix_tokens=1)
        score = hybrid_token_score(features, relevance.reshape(1, -1)[:, picks], group_size=16)
        ranked = np.sort(score, axis=-1)[:, ::-1]
        assert (ranked[:, kept - 1] - ranked[:, kept]).min() > 1e-4
        outputs = run(model, {**feeds, "picks": picks, "keep_tokens": np.array([kept])})
        _check(list(outputs), features, score, kept)


@pytest.mark.parametrize("scorer", ["norm", "random"])
def test_without_attention_the_way_of_the_relevance_goes(scorer: str) -> None:
    model = _picking()
    PruneVisionTokens(tokens=3, semantic=scorer)(model)  # type: ignore[arg-type]
    assert [value.name for value in model.graph.inputs] == ["q", "k", "v", "picks"]
    assert op_types(model).count("Gather") == 1
    assert not [value for node in model.graph for value in node.outputs if "relevance" in str(value.name)]


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            _picking(),
            {"keep": 0.5},
            r"varying number of tokens \(N\), of which no fraction can be stated; use keep_input",
        ),
        (
            _picking(patches=9),
            {"keep_input": True},
            "has 11 tokens and 'patch_relevance' 9; expected as many, or one more",
        ),
        (
            _picking(patches="P"),
            {"keep_input": True},
            "of which one is not a number; export both static or both dynamic",
        ),
    ],
)
def test_a_refused_graph_is_left_as_it_was(model: ir.Model, settings: dict[str, object], message: str) -> None:
    before, inputs = op_types(model), list(model.graph.inputs)
    with pytest.raises(GraphError, match=message):
        PruneVisionTokens(**settings)(model)  # type: ignore[arg-type]
    assert op_types(model) == before
    assert list(model.graph.inputs) == inputs


def test_a_cls_token_in_a_varying_number_of_tokens_is_refused() -> None:
    model = _varying(FUSED_4D)
    with pytest.raises(GraphError, match=r"a \[CLS\] among them cannot be told; use semantic 'received'"):
        PruneVisionTokens(keep_input=True, semantic="cls")(model)


def test_k_of_a_static_grid_may_be_an_input_and_may_be_all_but_no_more() -> None:
    model = graph("(float[B,6,4] x, float[B,6] score) => (float[B,6,4] image_features)", "image_features = Neg (x)")
    SelectGather(score="score", keep_input=True)(model)
    x, score = np.random.default_rng(0).standard_normal((1, 6, 4)).astype(np.float32), np.arange(6, dtype=np.float32)
    for kept in (6, 2):
        _check(list(run(model, {"x": x, "score": score[None], "keep_tokens": np.array([kept])})), -x, score[None], kept)
    with pytest.raises((InvalidArgument, RuntimeException, Fail)):
        run(model, {"x": x, "score": score[None], "keep_tokens": np.array([7])})


def test_k_is_given_once() -> None:
    with pytest.raises(InputError, match="give either keep or tokens or keep_input"):
        SelectGather(keep=0.5, keep_input=True)
