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
from qavp_export.numerics.two_level import quantize_grouped_8bit, quantize_two_level
from qavp_export.passes import W4A4, W8A16, FoldWeightTransposes, PlaceQdq, StoreHalf, realized_precision

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
    result = PlaceQdq(GROUP)(model)
    assert (result.matched, result.refused) == (2, [])
    x = rng.standard_normal((2, 5, K)).astype(np.float32)
    x[0, 1] = 0
    x[1, 2, 7] = 1e4
    a, b = _run(model, tmp_path, x)
    # The codes agree exactly (test below), so what differs is the order of float32 sums over K = 96 terms.
    xq = quantize_two_level(x, GROUP).dequantize().astype(np.float64)
    for actual, weight in ((a, first), (b, second)):
        expected = xq @ quantize_two_level(weight, GROUP).dequantize().T.astype(np.float64)
        bound = np.abs(xq) @ np.abs(weight).T * 1e-6 + 1e-6
        assert (np.abs(actual - expected) <= bound).all()


def test_stored_integers_equal_the_reference_exactly(rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    first, _ = _weights(model)
    PlaceQdq(GROUP, (("first", W4A4),))(model)
    expected = quantize_two_level(first, GROUP)
    parts = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert parts["w.codes"].dtype == ir.DataType.INT4
    assert parts["w.multipliers"].dtype == ir.DataType.UINT4
    np.testing.assert_array_equal(parts["w.codes"].numpy().astype(np.int8), expected.codes.T)
    np.testing.assert_array_equal(parts["w.multipliers"].numpy().astype(np.uint8), expected.multipliers.T)
    np.testing.assert_array_equal(parts["w.steps"].numpy(), expected.steps)


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


def test_w8a16_equals_the_reference(tmp_path: Path, rng: np.random.Generator) -> None:
    model = _two_linears(rng)
    first, _ = _weights(model)
    PlaceQdq(GROUP, (("first", W8A16),))(model)
    x = rng.standard_normal((1, 3, K)).astype(np.float32)
    actual = _run(model, tmp_path, x)[0]
    expected = x.astype(np.float64) @ quantize_grouped_8bit(first, GROUP).dequantize().T
    np.testing.assert_allclose(actual, expected, atol=1e-4)


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
