"""The functions of the TensorRT lowering, run by ONNX Runtime operator for operator, against `numerics/`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qavp_export.engines.lowering.linear import quantized_linears
from qavp_export.engines.lowering.split import remove_unused
from qavp_export.engines.tensorrt.functions import PLUGIN_ATTRIBUTES, QUANTIZE_TWO_LEVEL, W4A4_MATMUL
from qavp_export.engines.tensorrt.lowering.linear import LoweredLinears, lower_linears
from qavp_export.families import Plan
from qavp_export.numerics.rotation import orthogonal
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes import W4A4, W4A8, W4A16, W8A8, PlaceQdq, Rotate, RoundWeights, Scheme
from tests.engines.lowered import nodes_of, write_canonical
from tests.engines.tensorrt_graphs import check_parser_takes, needs_parser, tap
from tests.models.tiny import TinySpec
from tests.passes.decoders import hand_made, run_steps, trace_decoder
from tests.passes.graphs import run

Array = npt.NDArray[Any]

# Input channels, output channels, group size.
LINEARS = [(64, 5, 16), (96, 67, 32), (192, 1, 64), (256, 33, 128), (512, 6, 256)]
# Of sum |x||w|: float32 sums in another order, of at most 512 terms.
ROUNDING = 4e-6


def _weights(inputs: int, outputs: int) -> dict[str, Array]:
    rng = np.random.default_rng(inputs)
    shapes = {"w": (inputs, outputs), "v": (inputs, outputs + 2), "u": (inputs, 3)}
    weights = {name: rng.standard_normal(shape) * rng.uniform(0.1, 4, shape) for name, shape in shapes.items()}
    weights["v"][:, 0] = 0
    return {name: values.astype(np.float32) for name, values in weights.items()}


def _layers(sizes: tuple[int, int, int], scheme: Scheme = W4A4, body: str = "", **schemes: Scheme) -> ir.Model:
    """Two layers that read `x` and one that reads `y`."""
    inputs, outputs, group = sizes
    model = hand_made(
        f"float[B,S,{inputs}] x, float[B,S,{inputs}] y",
        f"float[B,S,{outputs}] a, float[B,S,{outputs + 2}] b, float[B,S,3] c",
        body or "[first] a = MatMul (x, w) [second] b = MatMul (x, v) [third] c = MatMul (y, u)",
        _weights(inputs, outputs),
    )
    PlaceQdq(group, [*schemes.items(), ("*", scheme)], RoundWeights(clip_search=False))(model)
    return model


def _inputs(channels: int, group: int) -> dict[str, Array]:
    """Tokens of zeros, with groups of zeros, huge and tiny ones, and ones in which a channel stands out."""
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((2, 5, channels)).astype(np.float32)
    x[0, 1] = 0
    x[0, 2] *= np.float32(1e30)
    x[0, 3] *= np.float32(1e-30)
    x[0, 4] *= np.float32(1e-43)
    x[1, 0, : group // 2] = 0
    x[1, 1] *= 10.0 ** rng.integers(-6, 5, channels).astype(np.float32)
    x[1, 2, 7] = 65504
    x[1, 3] = 1
    return {"x": x, "y": -np.roll(x, 3, axis=1)[:, ::-1].copy()}


def _products(quantized: TwoLevel) -> Array:
    group = quantized.codes.shape[-1] // quantized.multipliers.shape[-1]
    return quantized.codes.astype(np.int32) * np.repeat(quantized.multipliers.astype(np.int32), group, axis=-1)


@pytest.mark.parametrize("sizes", LINEARS)
def test_products_steps_and_sums_are_the_reference_ones(sizes: tuple[int, int, int]) -> None:
    model = _layers(sizes)
    result = lower_linears(model)
    remove_unused(model)
    assert result == LoweredLinears(dict.fromkeys(("first", "second", "third"), "w4a4"), ["first", "second", "third"])
    # `first` and `second` quantize the same value.
    assert [node.op_type for node in model.graph] == [
        *(QUANTIZE_TWO_LEVEL, W4A4_MATMUL, W4A4_MATMUL),
        *(QUANTIZE_TWO_LEVEL, W4A4_MATMUL),
    ]
    for number, node in enumerate(nodes_of(model, QUANTIZE_TWO_LEVEL)):
        tap(model, node.outputs[0], f"products{number}")
        tap(model, node.outputs[1], f"steps{number}")
    feeds = _inputs(sizes[0], sizes[2])
    names = [str(value.name) for value in model.graph.outputs]
    outputs = dict(zip(names, run(model, feeds), strict=True))
    weights = _weights(sizes[0], sizes[1])
    for number, (read, layers) in enumerate((("x", {"a": "w", "b": "v"}), ("y", {"c": "u"}))):
        expected = quantize_two_level(cast(Any, feeds[read]), sizes[2])
        assert outputs[f"products{number}"].dtype == np.int8
        np.testing.assert_array_equal(outputs[f"products{number}"], _products(expected))
        np.testing.assert_array_equal(outputs[f"steps{number}"], expected.steps[..., None])
        for output, weight in layers.items():
            of_weight = quantize_two_level(cast(Any, weights[weight].T), sizes[2])
            sums = (_products(expected) @ _products(of_weight).T).astype(np.float32)
            # In the kernels' order: the same bits.
            scales = expected.steps[..., None] * of_weight.steps
            np.testing.assert_array_equal(outputs[output], sums * scales)


@pytest.mark.parametrize("sizes", LINEARS)
def test_a_rotation_moves_into_the_quantizer(sizes: tuple[int, int, int]) -> None:
    inputs, outputs, group = sizes
    model = hand_made(
        f"float[B,S,{inputs}] x",
        f"float[B,S,{outputs}] a, float[B,S,{outputs + 2}] b",
        "[first] a = MatMul (x, w) [second] b = MatMul (x, v)",
        _weights(inputs, outputs),
    )
    Rotate(group, at="x", stream=False)(model)
    PlaceQdq(group)(model)
    lower_linears(model)
    remove_unused(model)
    assert [node.op_type for node in model.graph] == [QUANTIZE_TWO_LEVEL, W4A4_MATMUL, W4A4_MATMUL]
    quantizer = model.graph[0]
    assert quantizer.inputs[0] is model.graph.inputs[0]
    assert quantizer.attributes["rotate"].as_int() == 1
    tap(model, quantizer.outputs[0], "products")
    x = np.random.default_rng(3).standard_normal((2, 9, inputs)).astype(np.float32)
    x[0, 0] = 0
    products = run(model, {"x": x})[2]
    grid = x.reshape(2, 9, -1, group) @ orthogonal(group).astype(np.float32)
    expected = _products(quantize_two_level(grid.reshape(x.shape), group))
    # NumPy and ONNX Runtime sum the rotation in different orders: a code may be one off, and one in a thousand is.
    difference = np.abs(products.astype(np.int32) - expected)
    assert (difference <= 15).all()
    assert (difference > 0).mean() <= 2e-3
    assert not products[0, 0].any()


READ_ELSEWHERE = {
    "an output": ("r", ""),
    "another layer": ("b", "b = Relu (r)"),
    "a step of the rotation": ("b", "b = Relu (turned)"),
}


@pytest.mark.parametrize("case", READ_ELSEWHERE)
def test_a_rotation_that_is_read_elsewhere_stays(case: str) -> None:
    output, more = READ_ELSEWHERE[case]
    model = _rotated(orthogonal(32).astype(np.float32), output, more)
    lower_linears(model)
    remove_unused(model)
    (quantizer,) = nodes_of(model, QUANTIZE_TWO_LEVEL)
    assert quantizer.attributes["rotate"].as_int() == 0
    assert cast(ir.Value, quantizer.inputs[0]).name == "r"


def test_another_rotation_stays() -> None:
    turned = orthogonal(32).astype(np.float32)[:, ::-1].copy()
    model = _rotated(turned, "r", "")
    lower_linears(model)
    (quantizer,) = nodes_of(model, QUANTIZE_TWO_LEVEL)
    assert quantizer.attributes["rotate"].as_int() == 0


def _rotated(matrix: Array, output: str, more: str) -> ir.Model:
    shape = {"r": "[B,S,64]", "b": "[B,S,64]"}[output] if "turned" not in more else "[B,S,2,32]"
    body = f"""
        grid_shape = Constant <value_ints = [0, 0, 2, 32]> ()
        flat_shape = Constant <value_ints = [0, 0, 64]> ()
        grid = Reshape (x, grid_shape)
        turned = MatMul (grid, h)
        r = Reshape (turned, flat_shape)
        [first] a = MatMul (r, w)
        {more}
    """
    weights = {"w": _weights(64, 5)["w"], "h": matrix}
    model = hand_made("float[B,S,64] x", f"float[B,S,5] a, float{shape} {output}", body, weights)
    PlaceQdq(32, [("first", W4A4)])(model)
    return model


def test_weights_are_packed_when_they_are_read_and_their_file_is_let_go(tmp_path: Path) -> None:
    canonical = write_canonical(_layers((96, 67, 32)), tmp_path)
    model = canonical.clone()
    lower_linears(model)
    remove_unused(model)
    external = [v.const_value for v in canonical.graph.initializers.values()]
    assert all(isinstance(tensor, ir.ExternalTensor) and tensor.raw is None for tensor in external)
    feeds = _inputs(96, 32)
    before = {value.name: value.const_value for value in model.graph.initializers.values()}
    lazy = {name: tensor for name, tensor in before.items() if isinstance(tensor, ir.LazyTensor)}
    parts = ("codes.packed", "multipliers.by_output")
    assert sorted(map(str, lazy)) == sorted(f"{name}.{part}" for name in "uvw" for part in parts)
    ir.save(model, tmp_path / "lowered.onnx", external_data="lowered.data")
    read = [tensor for tensor in external if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth == 4]
    assert len(read) == 6
    assert all(tensor.raw is None for tensor in read)
    saved = ir.load(tmp_path / "lowered.onnx")
    expected = _layers((96, 67, 32))
    lower_linears(expected)
    remove_unused(expected)
    for actual, output in zip(run(_in_memory(saved), feeds), run(expected, feeds), strict=True):
        np.testing.assert_array_equal(actual, output)


def _in_memory(model: ir.Model) -> ir.Model:
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


@needs_parser
def test_where_there_are_no_plugins_the_parser_inlines_the_functions(tmp_path: Path) -> None:
    model = _layers((96, 67, 32))
    lower_linears(model)
    remove_unused(model)
    check_parser_takes(model, tmp_path)


def test_layers_that_share_a_weight_share_what_is_packed_of_it() -> None:
    model = _tied()
    result = lower_linears(model)
    remove_unused(model)
    assert result.matched == ["first", "second"]
    first, second = nodes_of(model, W4A4_MATMUL)
    assert list(first.inputs[2:]) == list(second.inputs[2:])
    assert len(model.graph.initializers) == 3


def _tied() -> ir.Model:
    weights = {"w": _weights(96, 67)["w"]}
    body = "[first] a = MatMul (x, w) [second] b = MatMul (y, w)"
    model = hand_made("float[B,S,96] x, float[B,S,96] y", "float[B,S,67] a, float[B,S,67] b", body, weights)
    PlaceQdq(32)(model)
    return model


REFUSED = {
    "one-level": ((96, 67, 32), Scheme("int4", "int4", "one-level"), "its group scales are floats; .*"),
    "group of 8": ((96, 67, 8), W4A4, "the kernels take groups of 16, 32, .* channels, not of 8"),
    "group of 48": ((96, 67, 48), W4A4, "the kernels take groups of 16, 32, .* channels, not of 48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_do_not_take_stays_and_is_reported(case: str) -> None:
    sizes, scheme, reason = REFUSED[case]
    model = _layers(sizes, scheme, third=W8A8)
    before = run(model, _inputs(sizes[0], 16))
    result = lower_linears(model)
    assert [refusal.node_name for refusal in result.refused] == ["first", "second"]
    for refusal in result.refused:
        assert re.fullmatch(reason, refusal.reason)
    assert result.matched == []
    assert result.precision == {"first": "w4a4", "second": "w4a4", "third": "w8a8"}
    for actual, expected in zip(run(model, _inputs(sizes[0], 16)), before, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_groups_of_another_size_than_the_weights_are_refused() -> None:
    model = _tied()
    for node in model.graph:
        if node.op_type == "TwoLevelScale":
            node.attributes["group_size"] = ir.AttrInt64("group_size", 16)
    assert {refusal.reason for refusal in lower_linears(model).refused} == {
        "its weight has groups of 32 channels and its input of 16"
    }


def test_a_second_group_size_is_refused() -> None:
    weights = _weights(96, 67)
    body = "[first] a = MatMul (x, w) [second] b = MatMul (y, u)"
    model = hand_made("float[B,S,96] x, float[B,S,96] y", "float[B,S,67] a, float[B,S,3] b", body, weights)
    PlaceQdq(32, [("first", W4A4)])(model)
    PlaceQdq(16, [("second", W4A4)])(model)
    before = run(model, _inputs(96, 16))
    result = lower_linears(model)
    assert result.matched == ["first"]
    assert [(refusal.node_name, refusal.reason) for refusal in result.refused] == [
        ("second", "it has groups of 16 channels, the graph's first W4A4 layer of 32")
    ]
    np.testing.assert_array_equal(run(model, _inputs(96, 16))[1], before[1])


def test_other_schemes_keep_their_quantizers() -> None:
    model = _layers((96, 67, 32), first=W4A8, second=W4A16)
    result = lower_linears(model)
    remove_unused(model)
    assert result.matched == ["third"]
    assert result.refused == []
    assert result.precision == {"first": "w4a8", "second": "w4a32", "third": "w4a4"}
    assert [layer.node.name for layer in quantized_linears(model.graph)] == ["first", "second"]


def test_nodes_carry_what_the_parser_looks_for() -> None:
    model = _layers((96, 67, 32))
    lower_linears(model)
    for op_type in (QUANTIZE_TWO_LEVEL, W4A4_MATMUL):
        for node in nodes_of(model, op_type):
            assert node.attributes["plugin_namespace"].as_string() == "qavp"
            assert node.attributes["plugin_version"].as_string() == "1"
            assert node.attributes["aot"].as_int() == 1
    assert set(PLUGIN_ATTRIBUTES) == {"plugin_namespace", "plugin_version", "aot"}


DECODERS = {
    "grouped heads": TinySpec(),
    "biases and tied embeddings": TinySpec(decoder="qwen2", kv_heads=3, tied=True, vocab=71, layers=1),
}


@cache
def _traced(name: str) -> tuple[ir.Model, Plan]:
    return trace_decoder(DECODERS[name])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_quantize_and_multiply_as_the_canonical_graph(name: str, rotated: bool) -> None:
    traced, plan = _traced(name)
    canonical = traced.clone()
    if rotated:
        Rotate(16)(canonical)
    PlaceQdq(16, [("*", W4A4)])(canonical)
    layers = list(quantized_linears(canonical.graph))
    lowered = canonical.clone()
    result = lower_linears(lowered)
    remove_unused(lowered)
    assert result.matched == [str(layer.node.name) for layer in layers]
    assert len(layers) == 7 * plan.num_layers + 1
    assert result.refused == []
    quantizers = nodes_of(lowered, QUANTIZE_TWO_LEVEL)
    # q, k and v share one, gate and up too.
    assert len(quantizers) == 4 * plan.num_layers + 1
    # The inputs of down, and those of o unless its heads are whole groups.
    assert sum(node.attributes["rotate"].as_int() for node in quantizers) == (plan.num_layers if rotated else 0)
    _check_layers(canonical, lowered, plan.hidden_size)
    embeds = np.random.default_rng(4).standard_normal((2, 7, plan.hidden_size)).astype(np.float32)
    before, after = run_steps(canonical, plan, embeds), run_steps(lowered, plan, embeds)
    # 5e-7 here; where a sum that is rounded otherwise flips a code, the layers behind it carry that on.
    error = np.abs(after.logits - before.logits).max() / np.abs(before.logits).max()
    assert error <= 0.02


def _check_layers(canonical: ir.Model, lowered: ir.Model, hidden: int) -> None:
    """Feeds every lowered layer what the canonical graph's layer reads, and compares integers and outputs."""
    probe = canonical.clone()
    taps: dict[str, ir.Value] = {}
    for layer in quantized_linears(probe.graph):
        assert layer.activation is not None
        for value in (layer.activation.x, layer.node.outputs[0]):
            taps[str(value.name)] = value
    for node in nodes_of(lowered, QUANTIZE_TWO_LEVEL):
        name = str(cast(ir.Value, node.inputs[0]).name)
        taps[name] = next(value for made in probe.graph for value in made.outputs if value.name == name)
    probe.graph.outputs[:] = list(taps.values())
    embeds = np.random.default_rng(2).standard_normal((2, 5, hidden)).astype(np.float32)
    seen = dict(zip(taps, run(probe, _prompt(probe, embeds)), strict=True))
    names = {str(layer.node.name): str(layer.node.outputs[0].name) for layer in quantized_linears(canonical.graph)}
    rotated = {str(layer.node.name): layer for layer in quantized_linears(canonical.graph)}
    alone = lowered.clone()
    feeds = {}
    for node in nodes_of(alone, QUANTIZE_TWO_LEVEL):
        read = cast(ir.Value, node.inputs[0])
        fed = ir.Value(name=f"{read.name}.fed", shape=read.shape, type=read.type)
        node.replace_input_with(0, fed)
        alone.graph.inputs.append(fed)
        feeds[f"{read.name}.fed"] = seen[str(read.name)]
    products = nodes_of(alone, W4A4_MATMUL)
    alone.graph.outputs[:] = [value for node in products for value in (node.inputs[0], node.outputs[0]) if value]
    remove_unused(alone)
    found = iter(run(alone, feeds))
    for node in products:
        codes, output = next(found), next(found)
        layer = rotated[str(node.name).removesuffix(f"/{W4A4_MATMUL}")]
        assert layer.activation is not None
        of_input = quantize_two_level(cast(Any, seen[str(layer.activation.x.name)]), 16)
        np.testing.assert_array_equal(codes, _products(of_input), err_msg=str(node.name))
        expected = seen[names[str(layer.node.name)]]
        weight = cast(Any, layer.codes.const_value).numpy().astype(np.float64)
        scales = cast(Any, layer.scales["multipliers"].const_value).numpy().astype(np.float64)
        weight *= np.repeat(scales, 16, axis=0) * cast(Any, layer.scales["steps"].const_value).numpy()
        bound = np.abs(of_input.dequantize()) @ np.abs(weight) * ROUNDING
        assert (np.abs(output - expected) <= bound).all(), node.name


def _prompt(model: ir.Model, embeds: Array) -> dict[str, Array]:
    """A prompt on an empty cache."""
    batch, length, _ = embeds.shape
    feeds: dict[str, Array] = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.arange(length)[None].repeat(batch, axis=0),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            _, heads, _, size = cast(ir.Shape, value.shape)
            feeds[str(value.name)] = np.zeros((batch, cast(int, heads), 0, cast(int, size)), np.float32)
    return feeds
