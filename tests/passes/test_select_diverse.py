"""SelectDiverse against its reference, index for index, in both forms and as users get it from the pass."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qavp_export.errors import GraphError, InputError
from qavp_export.numerics.diverse import Diversity, choose_diverse
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_tokens
from qavp_export.numerics.semantic import norm_relevance
from qavp_export.passes import PruneVisionTokens, SelectGather
from qavp_export.passes.functions import add_function
from qavp_export.passes.select_diverse import Form, select_diverse
from tests.passes.graphs import graph, op_types, run, session
from tests.token_sets import KINDS, draw_tokens

Array = npt.NDArray[np.generic]

BOTH: list[Diversity] = ["dpp", "maxmin"]
SIGNATURE = "(float[B,20,48] x, float[B,20] score) => (float[B,20,48] image_features)"
INPUTS = 200
# Of several thousand channels fewer are drawn: the reference takes its time.
WIDTHS = (5, 48)
SKETCHED = {1500: 44, 4096: 22}


@cache
def _session(select: Diversity, form: Form, dtype: str, width: int, opset: int, optimize: bool) -> ort.InferenceSession:
    model = graph(
        f"({dtype}[B,N,{width}] x, float[B,N] score, int64[1] k) => (int64[B,K] indices, int64[B,K] order)",
        "indices, order = qavp.SelectDiverse (x, score, k)",
        opset=opset,
        domains='"qavp": 1',
    )
    add_function(model, select_diverse(select, width, opset, form))
    return session(model, optimize=optimize)


def _draw(seed: int, width: int) -> tuple[Array, Array, int]:
    """Draws features, scores and k."""
    rng = np.random.default_rng(seed)
    images, tokens = int(rng.integers(1, 4)), int(rng.integers(1, 41))
    k = (1, tokens, max(1, tokens // 3), max(1, tokens - 1))[seed // KINDS % 4]
    return *draw_tokens(seed, images, tokens, width), k


@pytest.mark.parametrize("optimize", [False, True], ids=["as written", "optimized"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("form", ["portable", "cpu"])
@pytest.mark.parametrize("select", BOTH)
def test_indices_are_those_of_the_reference(select: Diversity, form: Form, dtype: str, optimize: bool) -> None:
    for seed in range(INPUTS):
        x, score, k = _draw(seed, WIDTHS[seed % len(WIDTHS)])
        x = x.astype(np.float16 if dtype == "float16" else np.float32)
        feeds = {"x": x, "score": score, "k": np.array([k])}
        indices, order = _session(select, form, dtype, x.shape[2], 23, optimize).run(None, feeds)
        expected = choose_diverse(select, x, score, k)
        np.testing.assert_array_equal(order, expected, err_msg=f"input {seed}")
        np.testing.assert_array_equal(indices, np.sort(expected, axis=-1))
        assert all(len(set(row)) == k for row in order.tolist())


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("form", ["portable", "cpu"])
@pytest.mark.parametrize("select", BOTH)
@pytest.mark.parametrize("width", SKETCHED)
def test_indices_of_sketches_are_those_of_the_reference(width: int, select: Diversity, form: Form, dtype: str) -> None:
    for seed in range(SKETCHED[width]):
        x, score, k = _draw(seed, width)
        x = x.astype(np.float16 if dtype == "float16" else np.float32)
        feeds = {"x": x, "score": score, "k": np.array([k])}
        _, order = _session(select, form, dtype, width, 23, True).run(None, feeds)
        np.testing.assert_array_equal(order, choose_diverse(select, x, score, k), err_msg=f"input {seed}")


@pytest.mark.parametrize("form", ["portable", "cpu"])
@pytest.mark.parametrize("select", BOTH)
def test_the_sizes_of_a_7b_model(select: Diversity, form: Form) -> None:
    rng = np.random.default_rng(0)
    # A common direction makes tokens similar, as features are.
    x = rng.standard_normal((1, 150, 4096)) + 2 * rng.standard_normal((1, 1, 4096))
    x[0, ::7] = np.sign(x[0, ::7])
    x, score = x.astype(np.float32), rng.random((1, 150)).astype(np.float32)
    feeds = {"x": x, "score": score, "k": np.array([75])}
    _, order = _session(select, form, "float", 4096, 18, True).run(None, feeds)
    np.testing.assert_array_equal(order, choose_diverse(select, x, score, 75))


@pytest.mark.parametrize("select", BOTH)
def test_the_pass_inserts_one_node_and_gathers(select: Diversity) -> None:
    model = graph(SIGNATURE, "image_features = Neg (x)")
    result = SelectGather(score="score", keep=0.3, select=select)(model)
    assert (result.matched, result.refused) == (1, [])
    nodes = {node.name: node for node in model.graph if node.op_type not in ("Constant", "Neg")}
    assert list(nodes) == [f"/prune/select/{name}" for name in ("SelectDiverse", "Unsqueeze", "GatherND")]
    node = nodes["/prune/select/SelectDiverse"]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    assert attributes == {"select": select, "plugin_namespace": "qavp", "plugin_version": "1", "aot": 1}
    assert node.domain == "qavp"
    assert [str(output.shape) for output in node.outputs] == ["[B,6]", "[B,6]"]
    assert [str(output.shape) for output in model.graph.outputs] == ["[B,6,48]", "[B,6]"]
    rng = np.random.default_rng(1)
    x, score = rng.standard_normal((3, 20, 48)).astype(np.float32), rng.random((3, 20)).astype(np.float32)
    features, indices = run(model, {"x": x, "score": score}, optimize=True)
    np.testing.assert_array_equal(indices, select_tokens(select, -x, score, 6))
    np.testing.assert_array_equal(features, np.take_along_axis(-x, indices[..., np.newaxis], axis=1))


@pytest.mark.parametrize("select", BOTH)
def test_one_graph_serves_several_sizes_and_budgets(select: Diversity) -> None:
    model = graph("(float[B,N,48] x) => (float[B,N,48] image_features)", "image_features = Neg (x)")
    PruneVisionTokens(keep_input=True, semantic="norm", select=select)(model)
    opened = session(model, optimize=True)
    for count, k in [(9, 4), (9, 9), (23, 4), (23, 1)]:
        x = np.random.default_rng(count).standard_normal((2, count, 48)).astype(np.float32)
        features, indices = opened.run(None, {"x": x, "keep_tokens": np.array([k])})
        score = hybrid_token_score(-x, norm_relevance(x), group_size=16)
        np.testing.assert_array_equal(indices, select_tokens(select, -x, score, k))
        np.testing.assert_array_equal(features, np.take_along_axis(-x, indices[..., np.newaxis], axis=1))


def test_a_second_rule_in_one_model_is_refused() -> None:
    model = graph(SIGNATURE, "image_features = Neg (x)")
    add_function(model, select_diverse("dpp", 48, 23))
    with pytest.raises(GraphError, match=r"already has a function qavp.SelectDiverse \(select=dpp, 48 channels\)"):
        SelectGather(score="score", tokens=2, select="maxmin")(model)
    assert op_types(model) == ["Neg"]


def test_more_tokens_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="tokens is 21"):
        SelectGather(score="score", tokens=21, select="dpp")(graph(SIGNATURE, "image_features = Neg (x)"))


def test_the_function_is_one_of_the_model() -> None:
    model = graph(SIGNATURE, "image_features = Neg (x)")
    SelectGather(score="score", tokens=2, select="dpp")(model)
    ((domain, name, _),) = model.functions
    assert (domain, name) == ("qavp", "SelectDiverse")
    assert isinstance(model.functions["qavp", "SelectDiverse", ""], ir.Function)
