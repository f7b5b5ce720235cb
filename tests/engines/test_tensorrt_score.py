"""The score of the TensorRT lowering, run by ONNX Runtime operator for operator, against `numerics/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qavp_export.engines.lowering.split import remove_unused
from qavp_export.engines.tensorrt.functions import (
    MIX_TOKEN_SCORE,
    TOKEN_SENSITIVITY,
)
from qavp_export.engines.tensorrt.lowering.score import lower_scores
from qavp_export.errors import GraphError
from qavp_export.numerics.score import ScoreInput, hybrid_token_score
from qavp_export.numerics.semantic import norm_relevance
from qavp_export.passes import InsertHybridScore
from qavp_export.passes.hybrid_score import SCORE
from tests.engines.lowered import nodes_of
from tests.engines.tensorrt_graphs import check_parser_takes, needs_parser, tap
from tests.passes.graphs import graph, session
from tests.passes.test_hybrid_score import KINDS, SIZES

Array = npt.NDArray[Any]


def _scored(
    size: tuple[int, int, int, int], score_input: ScoreInput, alpha: float, dtype: str, outlier_weight: float = 0.5
) -> ir.Model:
    tokens, width, group_size, _ = size
    features = f"{dtype}[B,{tokens},{width}]"
    model = graph(f"({features} x) => ({features} image_features)", "image_features = Identity (x)")
    InsertHybridScore("image_features", "norm", alpha, group_size, score_input, outlier_weight=outlier_weight)(model)
    tap(model, next(value for node in model.graph for value in node.outputs if value.name == SCORE), "score")
    result = lower_scores(model)
    remove_unused(model)
    takes = group_size & (group_size - 1) == 0 and group_size >= 16
    assert (result.matched, len(result.refused)) == (int(takes), int(not takes))
    return model


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("score_input", ["raw", "rms"])
def test_scores_are_the_reference_ones_bit_for_bit(score_input: ScoreInput, dtype: str) -> None:
    for number, size in enumerate(SIZES):
        alpha, mix = ((0.5, 0.5), (0.3, 1.0), (0.0, 0.25), (1.0, 0.0))[number % 4]
        model = _scored(size, score_input, alpha, dtype, mix)
        functions = {function.name for function in model.functions.values()}
        parts = {TOKEN_SENSITIVITY, MIX_TOKEN_SCORE} if size[2] >= 16 else {"HybridTokenScore"}
        assert functions == parts | {"TokenNorm"}
        runner = session(model, optimize=False)
        for seed, kind in enumerate(KINDS):
            features = KINDS[kind](np.random.default_rng(seed), (2, *size[:2]))
            if dtype == "float16":
                features = features.clip(-60000, 60000).astype(np.float16)
            expected = hybrid_token_score(
                features,
                norm_relevance(features),
                group_size=size[2],
                alpha=alpha,
                score_input=score_input,
                outlier_weight=mix,
            )
            np.testing.assert_array_equal(runner.run(["score"], {"x": features})[0], expected, err_msg=kind)


def test_the_parts_of_the_score_carry_its_settings() -> None:
    model = _scored((16, 64, 32, 4), "rms", 0.25, "float", 0.75)
    (sensitivity,), (mix,) = nodes_of(model, TOKEN_SENSITIVITY), nodes_of(model, MIX_TOKEN_SCORE)
    assert sensitivity.name == f"/prune/score/{TOKEN_SENSITIVITY}"
    assert sensitivity.attributes["group_size"].as_int() == 32
    assert sensitivity.attributes["rms"].as_int() == 1
    assert mix.attributes["alpha"].as_float() == 0.25
    assert mix.attributes["outlier_weight"].as_float() == 0.75
    assert [value.name for value in sensitivity.outputs] == [value.name for value in mix.inputs[:2] if value]
    for node in (sensitivity, mix):
        assert node.attributes["plugin_namespace"].as_string() == "qavp"


def test_a_score_that_the_kernel_does_not_take_says_why() -> None:
    model = graph("(float[1,4,35] x) => (float[1,4,35] image_features)", "image_features = Identity (x)")
    InsertHybridScore("image_features", "norm", group_size=7)(model)
    (refusal,) = lower_scores(model).refused
    assert refusal.node_name == "/prune/score/HybridTokenScore"
    assert refusal.reason == "the scoring kernel takes group sizes 16, 32, ... 1024, not 7"


def test_a_score_without_its_function_is_an_error() -> None:
    model = graph("(float[1,4,16] x) => (float[1,4,16] image_features)", "image_features = Identity (x)")
    InsertHybridScore("image_features", "norm", group_size=16)(model)
    function = next(function for function in model.functions.values() if function.name == "HybridTokenScore")
    model.functions.pop(function.identifier())
    with pytest.raises(GraphError, match="the function of /prune/score/HybridTokenScore is not in the model"):
        lower_scores(model)


@needs_parser
def test_where_there_are_no_plugins_the_parser_inlines_the_functions(tmp_path: Path) -> None:
    check_parser_takes(_scored((25, 96, 32, 3), "rms", 0.5, "float16"), tmp_path)
