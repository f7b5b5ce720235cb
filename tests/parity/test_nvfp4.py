"""The check of stored FP4 weights, on graphs that are right and graphs that are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qavp_export.errors import ParityError
from qavp_export.parity.nvfp4 import check_nvfp4_weights
from qavp_export.passes import FoldWeightTransposes
from qavp_export.passes.place_nvfp4 import PlaceNvfp4
from qavp_export.tracing import PARAMETER

K, N = 64, 24


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal((N, K)).astype(np.float32) for name in ("model.v.weight", "w")}


@pytest.fixture
def path(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    """Two linear layers; one weight is known by its parameter's name, one by its initializer's alone."""
    proto = onnx.parser.parse_model(f"""
        <ir_version: 11, opset_import: ["": 23]> two_linears (float[B,S,{K}] x) => (float[B,S,{N}] a, float[B,S,{N}] b)
        {{ vt = Transpose <perm = [1, 0]> (v) a = MatMul (x, vt) b = MatMul (x, w) }}
    """)
    model = ir.from_proto(proto)
    arrays = {"v": weights["model.v.weight"], "w": weights["w"].T}
    for node, index in ((model.graph[0], 0), (model.graph[2], 1)):
        value = node.inputs[index]
        array = np.ascontiguousarray(arrays[value.name])
        value.const_value, value.shape = ir.Tensor(array, name=value.name), ir.Shape(array.shape)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.name == "v":
            value.metadata_props[PARAMETER] = "model.v.weight"
        model.graph.register_initializer(value)
    FoldWeightTransposes()(model)
    PlaceNvfp4()(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    return tmp_path / "model.onnx"


def test_weights_of_the_checkpoint_pass(path: Path, weights: dict[str, np.ndarray]) -> None:
    asked: list[tuple[str, tuple[int, int]]] = []

    def expected(name: str, shape: tuple[int, int]) -> np.ndarray:
        asked.append((name, shape))
        return weights[name]

    assert check_nvfp4_weights(path, expected) == 2
    assert sorted(asked) == [("model.v.weight", (N, K)), ("w", (N, K))]


@pytest.mark.parametrize(
    ("part", "index", "value", "count"),
    [("codes", (3, 5), 3.0, f"1 of {N * K}"), ("block_scales", (0, 2), 1.0, f"1 of {N * K // 16}")],
)
def test_one_wrong_value_fails(
    path: Path, weights: dict[str, np.ndarray], part: str, index: tuple[int, int], value: float, count: str
) -> None:
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"w.{part}")
    array = numpy_helper.to_array(tensor).copy()
    assert float(array[index]) != value
    array[index] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    with pytest.raises(ParityError, match=rf"^{count} NVFP4 {part} of w are not the checkpoint's"):
        check_nvfp4_weights(path, lambda name, _: weights[name])


def test_another_sign_of_zero_fails(path: Path, weights: dict[str, np.ndarray]) -> None:
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w.codes")
    array = numpy_helper.to_array(tensor).copy()
    row, column = np.argwhere(array.astype(np.float32) == 0)[0]
    array[row, column] = -array[row, column]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    with pytest.raises(ParityError, match=r"^1 of 1536 NVFP4 codes of w"):
        check_nvfp4_weights(path, lambda name, _: weights[name])


def test_another_scale_above_the_blocks_fails(path: Path, weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(ParityError, match=r"^1 of 1 NVFP4 global_scale of w "):
        check_nvfp4_weights(path, lambda name, _: weights[name] * np.float32(2 if name == "w" else 1))


def test_a_transposed_weight_fails(path: Path, weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(ParityError, match=r"of 1536 NVFP4 codes of "):
        check_nvfp4_weights(path, lambda name, _: weights[name].reshape(K, N).T)


def test_a_missing_part_fails(path: Path, weights: dict[str, np.ndarray]) -> None:
    model = onnx.load(path)
    next(tensor for tensor in model.graph.initializer if tensor.name == "w.block_scales").name = "other"
    onnx.save(model, path)
    with pytest.raises(ParityError, match=r"^96 of 96 NVFP4 block_scales of w"):
        check_nvfp4_weights(path, lambda name, _: weights[name])
