"""NVFP4 placement on graphs built by hand, run by onnx's reference evaluator and compared with `numerics/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as OrtNotImplemented

from qavp_export.errors import GraphError
from qavp_export.numerics.nvfp4 import quantize_nvfp4_activations, quantize_nvfp4_weight
from qavp_export.passes import FoldWeightTransposes, realized_precision
from qavp_export.passes.place_nvfp4 import PlaceNvfp4

K, N = 96, 34


def _model(
    body: str, weights: dict[str, np.ndarray], *, inputs: str = f"float[B,S,{K}] x", opset: int = 23
) -> ir.Model:
    """A graph in ONNX's text form with outputs a and b, whose weights are initializers."""
    text = f'<ir_version: 10, opset_import: ["": {opset}]> hand_made ({inputs}) => (float[B,S,M] a, float[B,S,L] b)'
    model = ir.from_proto(onnx.parser.parse_model(f"{text} {{{body}}}"))
    for name, array in weights.items():
        uses = (value for node in model.graph for value in node.inputs if value is not None and value.name == name)
        value = next(uses)
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(value)
    return model


def _two_linears(rng: np.random.Generator, opset: int = 23) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Two linear layers on one input, the second stored as [N, K] behind a Transpose and with a bias."""
    shapes = {"w": (K, N), "v": (N, K), "bias": (N,)}
    weights = {name: rng.standard_t(4, shape).astype(np.float32) for name, shape in shapes.items()}
    body = """
        [first] a = MatMul (x, w)
        [turn] vt = Transpose <perm = [1, 0]> (v)
        [second] product = MatMul (x, vt)
        [add] b = Add (product, bias)
    """
    return _model(body, weights, opset=opset), weights


def _run(model: ir.Model, folder: Path, x: np.ndarray) -> list[np.ndarray]:
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    onnx.checker.check_model(path, full_check=True)
    return ReferenceEvaluator(onnx.load(path)).run(None, {"x": x})


def _activations(rng: np.random.Generator) -> np.ndarray:
    """Ordinary tokens, a token of zeros, one with an outlier and one with a block that E4M3 cannot scale."""
    x = rng.standard_normal((2, 5, K)).astype(np.float32)
    x[0, 1] = 0
    x[1, 2, 7] = 1e4
    x[1, 3, :16] *= 1e-7
    return x


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_an_opset_without_fp4_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(GraphError, match="uses opset 22; opset 23 or newer is needed"):
        PlaceNvfp4()(_two_linears(rng, opset=22)[0])


def test_the_product_equals_the_reference(tmp_path: Path, rng: np.random.Generator) -> None:
    model, weights = _two_linears(rng)
    FoldWeightTransposes()(model)
    result = PlaceNvfp4()(model)
    assert (result.matched, result.refused) == (2, [])
    x = _activations(rng)
    a, b = _run(model, tmp_path, x)
    represented = quantize_nvfp4_activations(x).dequantize().astype(np.float64)
    for actual, weight in ((a, weights["w"].T), (b - weights["bias"], weights["v"])):
        quantized = quantize_nvfp4_weight(np.ascontiguousarray(weight)).dequantize().T.astype(np.float64)
        # Codes and scales agree exactly (tests below); the order of float32 sums over K = 96 terms may differ.
        bound = np.abs(represented) @ np.abs(quantized) * 1e-6 + 1e-6
        assert (np.abs(actual - represented @ quantized) <= bound).all()
    assert (a[0, 1] == 0).all()


def test_stored_codes_and_scales_equal_the_reference_exactly(tmp_path: Path, rng: np.random.Generator) -> None:
    model, weights = _two_linears(rng)
    PlaceNvfp4(["first"])(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored}
    types = {tensor.name: tensor.data_type for tensor in stored}
    expected = quantize_nvfp4_weight(np.ascontiguousarray(weights["w"].T))
    assert types["w.codes"] == onnx.TensorProto.FLOAT4E2M1
    assert types["w.block_scales"] == onnx.TensorProto.FLOAT8E4M3FN
    np.testing.assert_array_equal(arrays["w.codes"].astype(np.float32), expected.codes.astype(np.float32))
    np.testing.assert_array_equal(arrays["w.block_scales"].astype(np.float32), expected.block_scales.astype(np.float32))
    np.testing.assert_array_equal(arrays["w.global_scale"], expected.global_scale)
    assert arrays["w.global_scale"].shape == ()
    assert "w" not in arrays


def test_run_time_codes_and_scales_equal_the_reference_exactly(tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = _two_linears(rng)
    PlaceNvfp4(["first"])(model)
    quantizer = next(node for node in model.graph if node.op_type == "TRT_FP4DynamicQuantize")
    rescale = next(node for node in model.graph if node.op_type == "Mul")
    model.graph.outputs.extend([*quantizer.outputs, rescale.inputs[1]])
    x = _activations(rng)
    codes, block_scales, token_scales = _run(model, tmp_path, x)[2:]
    expected = quantize_nvfp4_activations(x)
    np.testing.assert_array_equal(codes.astype(np.float32), expected.codes.astype(np.float32))
    np.testing.assert_array_equal(block_scales.astype(np.float32), expected.block_scales.astype(np.float32))
    np.testing.assert_array_equal(token_scales[..., 0], expected.global_scale)


def test_the_quantizer_is_written_as_tensorrt_reads_it(rng: np.random.Generator) -> None:
    """The form of NVIDIA Model-Optimizer's exporter and of TensorRT's importer."""
    model, _ = _two_linears(rng)
    FoldWeightTransposes()(model)
    PlaceNvfp4()(model)
    # One quantizer for both layers.
    (quantizer,) = [node for node in model.graph if node.domain == "trt"]
    attributes = {name: attribute.value for name, attribute in quantizer.attributes.items()}
    assert quantizer.op_type == "TRT_FP4DynamicQuantize"
    assert attributes == {"axis": -1, "block_size": 16, "scale_type": onnx.TensorProto.FLOAT8E4M3FN}
    # Its second scale is a constant scalar, and the scales' DequantizeLinear has the same.
    constant = quantizer.inputs[1]
    assert constant.producer().op_type == "Constant"
    assert constant.shape.rank() == 0
    codes, scales = quantizer.outputs
    ((outer, _),) = scales.uses()
    ((inner, _),) = codes.uses()
    assert (outer.op_type, list(outer.inputs)) == ("DequantizeLinear", [scales, constant])
    assert (inner.op_type, list(inner.inputs)) == ("DequantizeLinear", [codes, outer.outputs[0]])
    for node in model.graph:
        if node.op_type == "MatMul":
            turned = node.inputs[1].producer()
            weight = turned.inputs[0].producer()
            assert (turned.op_type, weight.op_type) == ("Transpose", "DequantizeLinear")
            assert node.inputs[0] is inner.outputs[0]
            assert {name: a.value for name, a in weight.attributes.items()} == {"axis": -1, "block_size": 16}
            assert weight.inputs[1].producer().op_type == "DequantizeLinear"


def test_nodes_need_no_names_and_may_have_two_outputs(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = {name: rng.standard_normal((48, N)).astype(np.float32) for name in "wv"}
    model = _model("u, z = Split <axis = -1, num_outputs = 2> (x) a = MatMul (u, w) b = MatMul (z, v)", weights)
    for value in model.graph[0].outputs:
        value.shape, value.type = ir.Shape(("B", "S", 48)), ir.TensorType(ir.DataType.FLOAT)
    assert PlaceNvfp4()(model).matched == 2
    x = rng.standard_normal((1, 2, K)).astype(np.float32)
    for actual, half, weight in zip(_run(model, tmp_path, x), np.split(x, 2, axis=-1), weights.values(), strict=True):
        quantized = quantize_nvfp4_weight(np.ascontiguousarray(weight.T)).dequantize().T
        expected = quantize_nvfp4_activations(half).dequantize() @ quantized
        # Sums of 48 float32 products, relative to the largest.
        np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max())


def test_names_of_outputs_stay(rng: np.random.Generator) -> None:
    model, _ = _two_linears(rng)
    PlaceNvfp4(["first"])(model)
    assert [value.name for value in model.graph.outputs] == ["a", "b"]
    assert model.graph.outputs[0].producer().op_type == "Mul"


def test_a_weight_of_two_layers_is_stored_once(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((K, K)).astype(np.float32)
    model = _model("[one] a = MatMul (x, w) [relu] y = Relu (a) [two] b = MatMul (y, w)", {"w": weight})
    model.graph[1].outputs[0].shape, model.graph[1].outputs[0].type = (
        model.graph.inputs[0].shape,
        model.graph.inputs[0].type,
    )
    PlaceNvfp4()(model)
    assert sorted(model.graph.initializers) == ["w.block_scales", "w.codes", "w.global_scale"]
    x = rng.standard_normal((1, 3, K)).astype(np.float32)
    _, b = _run(model, tmp_path, x)
    quantized = quantize_nvfp4_weight(np.ascontiguousarray(weight.T)).dequantize().T
    middle = np.maximum(quantize_nvfp4_activations(x).dequantize() @ quantized, 0)
    expected = quantize_nvfp4_activations(middle).dequantize() @ quantized
    # Float rounding of the first product may move a code of the second to its neighbour, an eighth of the largest.
    assert np.mean(np.abs(b - expected) <= 1e-4 * np.abs(expected).max()) > 0.9


def test_other_layers_stay(rng: np.random.Generator) -> None:
    model, _ = _two_linears(rng)
    FoldWeightTransposes()(model)
    PlaceNvfp4(["second"])(model)
    layers = [(layer.node, layer.weight, layer.precision) for layer in realized_precision(model)]
    assert layers == [("first", "w", "float32"), ("second", "v.transposed.codes", "nvfp4")]


def test_fp4_weights_with_float_activations_are_not_nvfp4(rng: np.random.Generator) -> None:
    model, _ = _two_linears(rng)
    PlaceNvfp4(["first"])(model)
    matmul = next(node for node in model.graph if node.name == "first")
    matmul.replace_input_with(0, model.graph.inputs[0])
    assert realized_precision(model)[0].precision == "float4e2m1"


def test_layers_that_were_rewritten_stay_as_they_are(rng: np.random.Generator) -> None:
    model, _ = _two_linears(rng)
    FoldWeightTransposes()(model)
    PlaceNvfp4(["first"])(model)
    assert PlaceNvfp4()(model).matched == 1
    assert [layer.precision for layer in realized_precision(model)] == ["nvfp4", "nvfp4"]
    assert not PlaceNvfp4()(model).modified


@pytest.mark.parametrize(
    ("inputs", "body", "rows", "reason"),
    [
        ("float[B,S,40] x", "[it] a = MatMul (x, w) b = Relu (a)", 40, "its 40 input channels are not a multiple of"),
        ("float[B,C,S,32] x", "[it] a = MatMul (x, w) b = Relu (a)", 32, "its input has rank 4; TensorRT quantizes"),
        ("float[S,32] x", "[it] a = Gemm (x, w) b = Relu (a)", 32, "it is a Gemm; convert it to MatMul"),
    ],
)
def test_layers_that_cannot_be_rewritten_are_refused(inputs: str, body: str, rows: int, reason: str) -> None:
    model = _model(body, {"w": np.ones((rows, 8), np.float32)}, inputs=inputs)
    result = PlaceNvfp4()(model)
    assert not result.modified
    assert [refusal.node_name for refusal in result.refused] == ["it"]
    assert result.refused[0].reason.startswith(reason)
    assert [node.op_type for node in model.graph] == [body.split()[3], "Relu"]


def test_weights_are_read_once_and_only_when_saved(tmp_path: Path, rng: np.random.Generator) -> None:
    model, weights = _two_linears(rng)
    reads: list[str] = []

    def read() -> ir.TensorProtocol:
        reads.append("w")
        return ir.Tensor(weights["w"])

    value = model.graph.initializers["w"]
    value.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape((K, N)), name="w")
    PlaceNvfp4(["first"])(model)
    assert reads == []
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert reads == ["w"]


def test_onnx_runtime_refuses_the_graph(rng: np.random.Generator) -> None:
    """Fails when ONNX Runtime learns FP4: the refusal on its behalf can then go."""
    model, _ = _two_linears(rng)
    PlaceNvfp4(["first"])(model)
    with pytest.raises(OrtNotImplemented, match=r"Could not find an implementation for DequantizeLinear\(23\)"):
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
