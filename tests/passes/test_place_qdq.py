"""Q/DQ placement on graphs built by hand, run by ONNX Runtime and compared with `numerics/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qavp_export.errors import GraphError
from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes import (
    SCHEMES,
    W4A4,
    W4A8,
    W4A16,
    W8A8,
    W8A16,
    FoldWeightTransposes,
    PlaceQdq,
    RoundWeights,
    Scheme,
    StoreHalf,
    realized_precision,
)

K, N, GROUP = 96, 67, 32


def _two_linears(rng: np.random.Generator, opset: int = 23) -> ir.Model:
    """Two linear layers on one input, the second stored as [N, K] behind a Transpose."""
    proto = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["": {opset}]>
        two_linears (float[B,S,{K}] x) => (float[B,S,{N}] a, float[B,S,{N}] b)
        {{
            [first] a = MatMul (x, w)
            [turn] vt = Transpose <perm = [1, 0]> (v)
            [second] b = MatMul (x, vt)
        }}
    """)
    model = ir.from_proto(proto)
    for name, shape in (("w", (K, N)), ("v", (N, K))):
        tensor = ir.Tensor(
            rng.standard_normal(shape).astype(np.float32) * rng.uniform(0.1, 4, shape).astype(np.float32),
            name=name,
        )
        used = next(value for node in model.graph for value in node.inputs if value is not None and value.name == name)
        used.const_value, used.shape, used.type = tensor, tensor.shape, ir.TensorType(tensor.dtype)
        model.graph.register_initializer(used)
    return model


def _run(model: ir.Model, folder: Path, x: np.ndarray, *, optimize: bool = False) -> list[np.ndarray]:
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    onnx.checker.check_model(path)
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def _weights(model: ir.Model) -> tuple[np.ndarray, np.ndarray]:
    """Returns both weights as [N, K]."""
    initializers = model.graph.initializers
    return initializers["w"].const_value.numpy().T.copy(), initializers["v"].const_value.numpy().copy()


def _weights_folded(model: ir.Model) -> list[np.ndarray]:
    """Returns the weights of all linear layers as [N, K]."""
    values = [node.inputs[1] for node in model.graph if node.op_type == "MatMul"]
    return [value.const_value.numpy().T.copy() for value in values]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_an_opset_without_int4_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(GraphError, match="uses opset 20; opset 21 or newer is needed"):
        PlaceQdq(GROUP)(_two_linears(rng, opset=20))


@pytest.mark.parametrize("opset", [21, 23])
def test_w4a4_equals_the_reference(tmp_path: Path, rng: np.random.Generator, opset: int) -> None:
    model = _two_linears(rng, opset)
    first, second = _weights(model)
    FoldWeightTransposes()(model)
    result = PlaceQdq(GROUP, quantizer=RoundWeights(clip_search=False))(model)
    assert (result.matched, result.refused) == (2, [])
    x = rng.standard_normal((2, 5, K)).astype(np.float32)
    x[0, 1] = 0
    x[1, 2, 7] = 1e4
    a, b = _run(model, tmp_path, x)
    # The codes agree exactly (tests below), so what differs is the order of float32 sums over K = 96 terms.
    xq = quantize_two_level(x, GROUP).dequantize().astype(np.float64)
    for actual, weight in ((a, first), (b, second)):
        expected = xq @ quantize_two_level(weight, GROUP).dequantize().T.astype(np.float64)
        bound = np.abs(xq) @ np.abs(weight).T * 1e-6 + 1e-6
        assert (np.abs(actual - expected) <= bound).all()


def test_run_time_codes_and_scales_equal_the_reference_exactly(tmp_path: Path, rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    PlaceQdq(GROUP, (("first", W4A4),))(model)
    scale = next(node for node in model.graph if node.op_type == "TwoLevelScale").outputs[0]
    values = next(node for node in model.graph if node.op_type == "DequantizeLinear" and "x/" in node.name).outputs[0]
    for value in (scale, values):
        value.dtype = ir.DataType.FLOAT
        model.graph.outputs.append(value)
    x = rng.standard_normal((3, 4, K)).astype(np.float32) * 10.0 ** rng.integers(-6, 7, (3, 4, K)).astype(np.float32)
    x[0, 0] = 0
    x[1, 1] = 65504
    x[2, 0, :GROUP] = 0
    _, _, scales, dequantized = _run(model, tmp_path, x)
    expected = quantize_two_level(x, GROUP)
    # A vector of zeros has scale 0 in the reference and 1 in the graph; its codes are 0 either way.
    np.testing.assert_array_equal(np.where(expected.steps[..., None] > 0, scales, 0), expected.scales())
    np.testing.assert_array_equal(dequantized, expected.dequantize())


ONE_LEVEL = {
    f"{name}, one-level": Scheme(kind.weights, kind.activations, "one-level") for name, kind in SCHEMES.items()
}
ALL_SCHEMES = {**SCHEMES, **ONE_LEVEL}


def _reference_weight(weight: np.ndarray, scheme: Scheme, *, clip: bool) -> TwoLevel | OneLevel:
    """Numerics section 3 and the schemes' definition; 8-bit weights with 8-bit inputs have one scale per channel."""
    if scheme.weights == "int8":
        return quantize_one_level(weight, K if scheme.activations == "int8" else GROUP, 8)
    if scheme.scales == "two-level":
        return quantize_two_level_clipped(weight, GROUP) if clip else quantize_two_level(weight, GROUP)
    return quantize_one_level_clipped(weight, GROUP) if clip else quantize_one_level(weight, GROUP, 4)


def _reference_activation(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    if scheme.activations is None:
        return x
    if scheme.activations == "int8":
        return quantize_one_level(x, K, 8).dequantize()
    return (
        quantize_two_level(x, GROUP) if scheme.scales == "two-level" else quantize_one_level(x, GROUP, 4)
    ).dequantize()


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_every_scheme_equals_the_reference(
    tmp_path: Path, rng: np.random.Generator, name: str, clip: bool, opset: int
) -> None:
    scheme = ALL_SCHEMES[name]
    model = _two_linears(rng, opset)
    weight, _ = _weights(model)
    PlaceQdq(GROUP, (("first", scheme),), RoundWeights(clip_search=clip))(model)
    assert realized_precision(model)[0].precision == name.split(",")[0]
    expected = _reference_weight(weight, scheme, clip=clip)
    stored = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    assert model.graph.initializers["w.codes"].dtype == getattr(ir.DataType, scheme.weights.upper())
    np.testing.assert_array_equal(stored["w.codes"].astype(np.int8), expected.codes.T)
    if isinstance(expected, TwoLevel):
        np.testing.assert_array_equal(stored["w.multipliers"].astype(np.uint8), expected.multipliers.T)
        np.testing.assert_array_equal(stored["w.steps"], expected.steps)
    else:
        np.testing.assert_array_equal(stored["w.scales"], expected.scales.T)
    if scheme.activations is not None:
        tapped = next(node.inputs[0] for node in model.graph if node.name == "first")
        assert tapped is not None
        model.graph.outputs.append(tapped)
    x = rng.standard_normal((2, 5, K)).astype(np.float32) * 10.0 ** rng.integers(-6, 5, (2, 5, K)).astype(np.float32)
    x[0, 1] = 0
    x[1, 0, :GROUP] = 0
    x[1, 2, 7] = 65504
    actual, _, *quantized = _run(model, tmp_path, x)
    inputs = _reference_activation(x, scheme)
    for values in quantized:
        np.testing.assert_array_equal(values, inputs)
    # Codes and scales are equal, so what is left is the order of float32 sums over K = 96 terms.
    product = inputs.astype(np.float64) @ expected.dequantize().T.astype(np.float64)
    bound = np.abs(inputs.astype(np.float64)) @ np.abs(expected.dequantize()).T * 1e-6
    assert (np.abs(actual - product) <= bound).all()
    assert not actual[0, 1].any()


@pytest.mark.parametrize(
    ("first", "second", "quantizers"),
    [
        (W4A4, W4A4, 1),
        (W4A4, W8A8, 2),
        # The bits of the weight do not matter to the input.
        (W4A8, W8A8, 1),
        (W4A4, W4A16, 1),
        (W4A16, W8A16, 0),
        (W4A4, Scheme("int4", "int4", "one-level"), 2),
        (W4A8, None, 1),
    ],
)
def test_layers_on_one_input_share_a_quantization_if_they_quantize_alike(
    tmp_path: Path, rng: np.random.Generator, first: Scheme, second: Scheme | None, quantizers: int
) -> None:
    model = _two_linears(rng)
    FoldWeightTransposes()(model)
    weights = _weights_folded(model)
    PlaceQdq(GROUP, (("first", first), ("second", second)))(model)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == quantizers
    x = rng.standard_normal((1, 3, K)).astype(np.float32)
    for actual, weight, scheme in zip(_run(model, tmp_path, x), weights, (first, second), strict=True):
        rounded = weight if scheme is None else _reference_weight(weight, scheme, clip=True).dequantize()
        inputs = x if scheme is None else _reference_activation(x, scheme)
        np.testing.assert_allclose(actual, inputs.astype(np.float64) @ rounded.T, atol=1e-4)


def test_the_first_scheme_that_matches_wins_and_none_leaves_a_layer_float(rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    FoldWeightTransposes()(model)
    result = PlaceQdq(GROUP, (("f*", None), ("*", W4A8), ("second", W8A8)))(model)
    assert result.matched == 1
    assert [layer.precision for layer in realized_precision(model)] == ["float32", "w4a8"]


def test_a_weight_that_layers_share_in_two_schemes_is_refused_to_the_second(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = _two_linears(rng)
    FoldWeightTransposes()(model)
    first, second = (node for node in model.graph if node.op_type == "MatMul")
    second.replace_input_with(1, first.inputs[1])
    result = PlaceQdq(GROUP, (("first", W4A4), ("second", W8A8)))(model)
    assert [(refusal.node_name, refusal.reason) for refusal in result.refused] == [
        ("second", "it shares its weight with a layer of another scheme")
    ]
    assert [layer.precision for layer in realized_precision(model)] == ["w4a4", "float32"]
    _run(model, tmp_path, rng.standard_normal((1, 2, K)).astype(np.float32))


def test_nodes_without_names_and_outputs_of_one_node_do_not_collide(tmp_path: Path, rng: np.random.Generator) -> None:
    proto = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["": 23]>
        halves (float[B,{2 * K}] x) => (float[B,{N}] a, float[B,{N}] b)
        {{ l, r = Split <axis = 1, num_outputs = 2> (x)  a = MatMul (l, w)  b = MatMul (r, v) }}
    """)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    weights = {name: rng.standard_normal((K, N)).astype(np.float32) for name in ("w", "v")}
    for node in model.graph:
        node.name = None
        for value in node.inputs:
            if value is not None and value.name in weights:
                tensor = ir.Tensor(weights[value.name], name=value.name)
                value.const_value, value.shape, value.type = tensor, tensor.shape, ir.TensorType(tensor.dtype)
                model.graph.register_initializer(value)
    assert PlaceQdq(GROUP)(model).matched == 2
    x = rng.standard_normal((3, 2 * K)).astype(np.float32)
    for actual, half, weight in zip(_run(model, tmp_path, x), np.split(x, 2, axis=1), weights.values(), strict=True):
        rounded = quantize_two_level_clipped(np.ascontiguousarray(weight.T), GROUP).dequantize()
        inputs = quantize_two_level(half, GROUP).dequantize().astype(np.float64)
        np.testing.assert_allclose(actual, inputs @ rounded.T, atol=1e-4)


def test_layers_on_one_input_share_one_quantization(rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    FoldWeightTransposes()(model)
    PlaceQdq(GROUP)(model)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1
    assert [layer.precision for layer in realized_precision(model)] == ["w4a4", "w4a4"]


def test_layers_that_share_a_weight_share_its_codes(tmp_path: Path, rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    FoldWeightTransposes()(model)
    first, second = (node for node in model.graph if node.op_type == "MatMul")
    second.replace_input_with(1, first.inputs[1])
    assert PlaceQdq(GROUP)(model).matched == 2
    a, b = _run(model, tmp_path, rng.standard_normal((1, 2, K)).astype(np.float32))
    np.testing.assert_array_equal(a, b)
    assert sum(value.dtype == ir.DataType.INT4 for value in model.graph.initializers.values()) == 1


def test_unfolded_transpose_is_left_alone_and_others_are_reported(rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    result = PlaceQdq(40, (("first", W4A4),))(model)
    assert not result.modified
    assert [(refusal.node_name, refusal.reason) for refusal in result.refused] == [
        ("first", "its 96 input channels are not a multiple of the group size 40")
    ]
    assert [layer.precision for layer in realized_precision(model)] == ["float32", "float32"]


def test_no_weight_is_read_before_saving() -> None:
    proto = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["": 23]>
        one (float[B,{K}] x) => (float[B,{N}] y) {{ wt = Transpose <perm = [1, 0]> (w)  [it] y = MatMul (x, wt) }}
    """)
    model = ir.from_proto(proto)
    weight = model.graph[0].inputs[0]
    assert weight is not None

    def read() -> ir.TensorProtocol:
        raise AssertionError("the weight was read")

    weight.shape, weight.type = ir.Shape((N, K)), ir.TensorType(ir.DataType.FLOAT)
    weight.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape((N, K)), name="w")
    model.graph.register_initializer(weight)
    FoldWeightTransposes()(model)
    PlaceQdq(GROUP)(model)
    with pytest.raises(AssertionError, match="the weight was read"):
        model.graph.initializers["w.transposed.codes"].const_value.numpy()


def test_each_weight_is_read_once(tmp_path: Path, rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    reads: list[str] = []
    value = model.graph.initializers["w"]
    tensor = value.const_value
    assert tensor is not None

    def read() -> ir.TensorProtocol:
        reads.append("w")
        return ir.Tensor(tensor.numpy())

    value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape((K, N)), name="w")
    PlaceQdq(GROUP, (("first", W4A4),))(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert reads == ["w"]


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_store_half_is_lossless_for_weights_that_came_from_half(
    tmp_path: Path, rng: np.random.Generator, dtype: ir.DataType
) -> None:
    model = _two_linears(rng)
    for name in ("w", "v"):
        value = model.graph.initializers[name]
        half = value.const_value.numpy().astype(dtype.numpy()).astype(np.float32)
        value.const_value = ir.Tensor(half, name=name)
    x = rng.standard_normal((1, 2, K)).astype(np.float32)
    before = _run(model, tmp_path, x)
    result = StoreHalf({"w": dtype, "v": dtype, "absent": dtype})(model)
    assert result.matched == 2
    after = _run(model, tmp_path, x)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.graph.initializers["w"].dtype == dtype


def test_store_half_casts_rows_of_a_table_after_the_gather(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 11, opset_import: ["": 23]>
        table (int64[S] x) => (float[S,3] y) { [pick] y = Gather (t, x) }
    """)
    model = ir.from_proto(proto)
    table = model.graph[0].inputs[0]
    values = np.arange(15, dtype=np.float32).reshape(5, 3)
    table.const_value, table.shape, table.type = (
        ir.Tensor(values, name="t"),
        ir.Shape((5, 3)),
        ir.TensorType(ir.DataType.FLOAT),
    )
    model.graph.register_initializer(table)
    StoreHalf({"t": ir.DataType.FLOAT16})(model)
    assert [node.op_type for node in model.graph] == ["Gather", "Cast"]
    np.testing.assert_array_equal(_run(model, tmp_path, np.array([4, 0]))[0], values[[4, 0]])
