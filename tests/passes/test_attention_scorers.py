"""The scorers `cls` and `received` on every form of attention, against the NumPy reference."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qavp_export.errors import GraphError
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.semantic import cls_relevance, received_relevance
from qavp_export.passes import InsertHybridScore
from qavp_export.passes.hybrid_score import SCORE
from tests.passes.graphs import graph, op_types, run

HEADS, SIZE, PATCHES = 3, 16, 10
WIDTH = HEADS * SIZE

# What stands between the attention `[B,T,48]` and the features: the [CLS] is cut off where there is one.
CUT = """
    zero = Constant <value_ints: ints = [0]> () one = Constant <value_ints: ints = [1]> ()
    end = Constant <value_ints: ints = [1000]> ()
    image_features = Slice (mixed, one, end, one)
"""
KEEP = "image_features = Identity (mixed)"
MERGE = """
    turned = Transpose <perm = [0, 2, 1, 3]> (heads)
    flat = Constant <value_ints: ints = [0, 0, 48]> () mixed = Reshape (turned, flat)
"""
FUSED_4D = "heads = Attention <scale: float = 0.4> (q, k, v)" + MERGE
FUSED_4D_DEFAULT_SCALE = "heads = Attention (q, k, v)" + MERGE
FLATTEN = """
    q_turned = Transpose <perm = [0, 2, 1, 3]> (q) q_flat = Reshape (q_turned, shape)
    k_turned = Transpose <perm = [0, 2, 1, 3]> (k) k_flat = Reshape (k_turned, shape)
    v_turned = Transpose <perm = [0, 2, 1, 3]> (v) v_flat = Reshape (v_turned, shape)
"""
FUSED_3D = (
    "shape = Constant <value_ints: ints = [0, 0, 48]> ()"
    + FLATTEN
    + "mixed = Attention <q_num_heads = 3, kv_num_heads = 3> (q_flat, k_flat, v_flat)"
)
MULTI_HEAD = (
    "shape = Constant <value_ints: ints = [0, 0, 48]> ()"
    + FLATTEN
    + "mixed = com.microsoft.MultiHeadAttention <num_heads = 3> (q_flat, k_flat, v_flat)"
)
OPEN = (
    """
    key = Transpose <perm = [0, 1, 3, 2]> (k) logits = MatMul (q, key)
    factor = Constant <value_float: float = 0.4> () scaled = Mul (logits, factor)
    weights = Softmax (scaled) half = Cast <to = 10> (weights) back = Cast <to = 1> (half)
    heads = MatMul (back, v)
"""
    + MERGE
)


def _tower(attention: str, tokens: int, *, opset: int = 23) -> ir.Model:
    behind = CUT if tokens > PATCHES else KEEP
    shape = f"float[B,{HEADS},{tokens},{SIZE}]"
    signature = f"({shape} q, {shape} k, {shape} v) => (float[B,{PATCHES},{WIDTH}] image_features)"
    model = graph(signature, attention + behind, opset=opset)
    if "com.microsoft" in attention:
        # ONNX knows no shape of other domains.
        mixed = ir.convenience.create_value_mapping(model.graph)["mixed"]
        mixed.dtype, mixed.shape = ir.DataType.FLOAT, ir.Shape(["B", tokens, WIDTH])
    return model


def _feeds(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    return {name: rng.standard_normal((2, HEADS, tokens, SIZE)).astype(np.float32) for name in "qkv"}


@pytest.mark.parametrize("optimize", [False, True], ids=["as written", "optimized"])
@pytest.mark.parametrize(
    ("attention", "scale"),
    [(FUSED_4D, 0.4), (FUSED_4D_DEFAULT_SCALE, 0.25), (FUSED_3D, 0.25), (MULTI_HEAD, 0.25), (OPEN, 0.4)],
    ids=["4-D", "4-D default scale", "3-D", "MultiHeadAttention", "Softmax"],
)
@pytest.mark.parametrize(("scorer", "prefix"), [("cls", 1), ("received", 1), ("received", 0)])
def test_score_equals_reference(attention: str, scale: float, scorer: str, prefix: int, optimize: bool) -> None:
    model = _tower(attention, PATCHES + prefix)
    InsertHybridScore(semantic=scorer, group_size=16)(model)  # type: ignore[arg-type]
    model.graph.outputs.append(ir.convenience.create_value_mapping(model.graph)[SCORE])
    feeds = _feeds(PATCHES + prefix)
    features, score = run(model, feeds, optimize=optimize)
    if scorer == "cls":
        relevance = cls_relevance(feeds["q"], feeds["k"], scale)
    else:
        relevance = received_relevance(feeds["q"], feeds["k"], scale, prefix_tokens=prefix)
    # exp, matrix products and means are free to round their own way: 1e-5 of a score in [0, 1].
    np.testing.assert_allclose(score, hybrid_token_score(features, relevance, group_size=16), atol=1e-5)


def test_a_float16_tower_is_scored_in_float32() -> None:
    shape = f"float16[B,{HEADS},{PATCHES + 1},{SIZE}]"
    signature = f"({shape} q, {shape} k, {shape} v) => (float16[B,{PATCHES},{WIDTH}] image_features)"
    model = graph(signature, FUSED_4D + CUT)
    InsertHybridScore(semantic="cls", group_size=16)(model)
    model.graph.outputs.append(ir.convenience.create_value_mapping(model.graph)[SCORE])
    feeds = {name: value.astype(np.float16) for name, value in _feeds(PATCHES + 1).items()}
    features, score = run(model, feeds)
    expected = hybrid_token_score(features, cls_relevance(feeds["q"], feeds["k"], 0.4), group_size=16)
    # float32 throughout: float16 would be off by 1e-3.
    np.testing.assert_allclose(score, expected, atol=1e-5)


def test_cls_computes_one_query_row() -> None:
    model = _tower(FUSED_4D, PATCHES + 1)
    InsertHybridScore(semantic="cls")(model)
    softmax = next(node for node in model.graph if node.name == "/prune/semantic/Softmax")
    assert str(softmax.outputs[0].shape) == f"[B,{HEADS},1,{PATCHES + 1}]"


def test_a_written_out_softmax_is_read_and_not_recomputed() -> None:
    model = _tower(OPEN, PATCHES + 1, opset=18)
    InsertHybridScore(semantic="cls")(model)
    assert op_types(model).count("Softmax") == 1
    assert op_types(model).count("MatMul") == 2


def test_the_last_attention_counts() -> None:
    first = "early = Attention <scale: float = 0.1> (q, k, v)"
    second = "heads = Attention <scale: float = 0.4> (q, k, early)" + MERGE
    unrelated = "late = Attention <scale: float = 0.7> (q, k, heads) unused = Neg (late)"
    model = _tower(first + second + unrelated, PATCHES + 1)
    InsertHybridScore(semantic="cls")(model)
    values = ir.convenience.create_value_mapping(model.graph)
    scale = values["/prune/semantic/scale_output_0"]
    assert ir.convenience.get_const_tensor(scale).numpy() == np.float32(0.4)  # type: ignore[union-attr]


def test_weights_without_data_are_enough() -> None:
    model = graph(
        f"(float[B,11,{WIDTH}] x) => (float[B,10,{WIDTH}] image_features)",
        "mixed = Attention <q_num_heads = 3, kv_num_heads = 3> (x, x, x)"
        + CUT.replace("image_features", "cut")
        + "image_features = MatMul (cut, weight)",
    )
    weight = model.graph[-1].inputs[1]
    assert weight is not None
    weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape([WIDTH, WIDTH])
    model.graph.initializers.add(weight)
    # The shape is missing as well, so inference runs over a weight that is not there.
    model.graph.outputs[0].shape = None
    assert InsertHybridScore(semantic="cls")(model).matched == 1
    assert weight.const_value is None


MASKED = (
    "mask = Constant <value = float[11, 11] {" + ", ".join(["0"] * 121) + "}> ()"
    "heads = Attention (q, k, v, mask)" + MERGE
)


@pytest.mark.parametrize(
    ("attention", "tokens", "scorer", "message"),
    [
        (FUSED_4D, PATCHES, "cls", "the tower has no \\[CLS\\] token; use semantic 'received'"),
        (OPEN, PATCHES, "cls", "the tower has no \\[CLS\\] token; use semantic 'received'"),
        ("heads = Attention <is_causal = 1> (q, k, v)" + MERGE, PATCHES + 1, "cls", "it is causal"),
        ("heads = Attention <softcap: float = 5.0> (q, k, v)" + MERGE, PATCHES + 1, "cls", "softcap"),
        (MASKED, PATCHES + 1, "cls", "it has a mask"),
        (MERGE.replace("heads", "q"), PATCHES + 1, "cls", "no attention upstream of 'image_features'"),
    ],
    ids=["no [CLS], fused", "no [CLS], Softmax", "causal", "softcap", "mask", "no attention"],
)
def test_attention_that_cannot_be_scored_is_refused(attention: str, tokens: int, scorer: str, message: str) -> None:
    model = _tower(attention, tokens)
    before = op_types(model)
    with pytest.raises(GraphError, match=message) as caught:
        InsertHybridScore(semantic=scorer)(model)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert op_types(model) == before


def test_a_projector_that_merges_tokens_is_refused() -> None:
    body = FUSED_4D + "shape = Constant <value_ints: ints = [0, 5, 96]> () image_features = Reshape (mixed, shape)"
    shape = f"float[B,{HEADS},{PATCHES},{SIZE}]"
    model = graph(f"({shape} q, {shape} k, {shape} v) => (float[B,5,96] image_features)", body)
    with pytest.raises(GraphError, match="has 10 tokens and 'image_features' 5"):
        InsertHybridScore(semantic="received")(model)


def test_grouped_heads_and_cross_attention_are_refused() -> None:
    signature = (
        f"(float[B,4,{PATCHES},{SIZE}] q, float[B,{{heads}},{{keys}},{SIZE}] k)"
        f" => (float[B,{PATCHES},64] image_features)"
    )
    body = """heads = Attention (q, k, k) turned = Transpose <perm = [0, 2, 1, 3]> (heads)
        flat = Constant <value_ints: ints = [0, 0, 64]> () image_features = Reshape (turned, flat)"""
    with pytest.raises(GraphError, match="4 query heads and 2 key heads"):
        InsertHybridScore(semantic="received")(graph(signature.format(heads=2, keys=PATCHES), body))
    with pytest.raises(GraphError, match="it is not self-attention"):
        InsertHybridScore(semantic="received")(graph(signature.format(heads=4, keys=7), body))
