"""The selection of the TensorRT lowering, run by ONNX Runtime operator for operator, against `numerics/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qavp_export.engines.lowering.split import remove_unused
from qavp_export.engines.tensorrt.functions import SELECT_DPP, SELECT_MAXMIN, TOKEN_CODES, TOKEN_PRODUCTS
from qavp_export.engines.tensorrt.lowering.capabilities import TENSORRT, TENSORRT_RTX
from qavp_export.engines.tensorrt.lowering.select import lower_selection
from qavp_export.engines.tensorrt.lowering.vision import lower_vision
from qavp_export.errors import GraphError
from qavp_export.numerics.diverse import Diversity, choose_diverse
from qavp_export.passes import SelectGather
from tests.engines.lowered import nodes_of
from tests.engines.tensorrt_graphs import attended, check_parser_takes, needs_parser
from tests.passes.graphs import graph, session

Array = npt.NDArray[Any]

BOTH: list[Diversity] = ["dpp", "maxmin"]
CHOICES = {"dpp": SELECT_DPP, "maxmin": SELECT_MAXMIN}


def _selecting(select: Diversity, features: str, tokens: int, *, keep_input: bool = False) -> ir.Model:
    signature = f"({features} x, float[B,N] score) => ({features} image_features)"
    model = graph(signature, "image_features = Identity (x)")
    kept = None if keep_input else tokens
    SelectGather(score="score", tokens=kept, keep_input=keep_input, select=select)(model)
    return model


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("select", BOTH)
def test_indices_are_those_of_the_reference(select: Diversity, dtype: str) -> None:
    model = _selecting(select, f"{dtype}[B,23,48]", 17)
    order = nodes_of(model, "SelectDiverse")[0].outputs[1]
    model.graph.outputs.append(order)
    order.name = "order"
    assert lower_selection(model).matched == 1
    remove_unused(model)
    assert {function.name for function in model.functions.values()} == {TOKEN_CODES, TOKEN_PRODUCTS, CHOICES[select]}
    runner = session(model, optimize=False)
    # `maxmin` does not read the score.
    inputs = {value.name for value in runner.get_inputs()}
    assert inputs == ({"x", "score"} if select == "dpp" else {"x"})
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, score = rng.standard_normal((2, 23, 48)), rng.random((2, 23)).astype(np.float32)
        if seed % 3 == 1:
            x[:, 5:12] = x[:, :7]
        if seed % 3 == 2:
            x[:, ::4], score[:] = 0, 1
        x = x.astype(np.float16 if dtype == "float16" else np.float32)
        features, indices, chosen = runner.run(
            None, {name: value for name, value in (("x", x), ("score", score)) if name in inputs}
        )
        expected = choose_diverse(select, x, score, 17)
        np.testing.assert_array_equal(chosen, expected, err_msg=f"input {seed}")
        np.testing.assert_array_equal(indices, np.sort(expected, axis=1))
        np.testing.assert_array_equal(features, np.take_along_axis(x, indices[..., None], axis=1))


@pytest.mark.parametrize("select", BOTH)
def test_the_parts_are_plugins(select: Diversity) -> None:
    model = _selecting(select, "float[B,20,48]", 6)
    lower_selection(model)
    remove_unused(model)
    (codes,), (products,), (choice,) = (
        nodes_of(model, name) for name in (TOKEN_CODES, TOKEN_PRODUCTS, CHOICES[select])
    )
    assert choice.name == f"/prune/select/{CHOICES[select]}"
    assert choice.attributes["kept"].as_int() == 6
    for node in (codes, products, choice):
        assert node.attributes["plugin_namespace"].as_string() == "qavp"
        assert node.attributes["aot"].as_int() == 1
    assert [(value.dtype, str(value.shape)) for value in (*codes.outputs, *products.outputs, *choice.outputs[:2])] == [
        (ir.DataType.INT8, "[B,20,48]"),
        (ir.DataType.FLOAT, "[B,20,20]"),
        *[(ir.DataType.INT32, "[B,6]")] * 2,
    ]


def test_only_where_there_are_plugins() -> None:
    model = _selecting("dpp", "float[B,20,48]", 6)
    assert nodes_of(lower_vision(model, TENSORRT).model, SELECT_DPP)
    assert nodes_of(lower_vision(model, TENSORRT_RTX).model, "SelectDiverse")
    assert nodes_of(model, "SelectDiverse")


@pytest.mark.parametrize("select", BOTH)
def test_no_attention_stays_beside_a_loop(select: Diversity) -> None:
    # TensorRT-RTX's builder dies of both.
    for keep_input, capabilities, stays in [
        (False, TENSORRT, True),
        (True, TENSORRT, False),
        (False, TENSORRT_RTX, False),
    ]:
        model = attended(select, 6, keep_input=keep_input)
        network = lower_vision(model, capabilities)
        assert len(nodes_of(network.model, "Attention")) == stays
        assert len(nodes_of(network.model, "SelectDiverse")) == (not stays)
        assert list(network.expected) == ["/attn" if stays else "/attn/MatMul"]


@pytest.mark.parametrize(
    ("features", "tokens", "keep_input", "reason"),
    [
        ("float[B,20,48]", 5, True, "it keeps a number of tokens that is given at run time"),
        ("float[B,N,48]", 5, False, "its features have no static number of tokens and channels"),
        ("float[B,9000,48]", 5, False, "the selection kernels take at most 4096 tokens of an image, not 9000"),
        ("float[B,20,20000]", 5, False, "the selection kernels take at most 16384 channels, not 20000"),
    ],
)
def test_what_the_kernels_do_not_take_stays(features: str, tokens: int, keep_input: bool, reason: str) -> None:
    model = _selecting("dpp", features, tokens, keep_input=keep_input)
    (refusal,) = lower_selection(model).refused
    assert (refusal.node_name, refusal.reason) == ("/prune/select/SelectDiverse", reason)
    assert len(nodes_of(model, "SelectDiverse")) == 1


def test_a_selection_without_its_function_is_an_error() -> None:
    model = _selecting("dpp", "float[B,20,48]", 5)
    model.functions.clear()
    with pytest.raises(GraphError, match="the function of /prune/select/SelectDiverse is not in the model"):
        lower_selection(model)


@needs_parser
@pytest.mark.parametrize("select", BOTH)
def test_where_there_are_no_plugins_the_parser_inlines_the_functions(select: Diversity, tmp_path: Path) -> None:
    model = _selecting(select, "float[B,20,48]", 6)
    lower_selection(model)
    remove_unused(model)
    check_parser_takes(model, tmp_path)
