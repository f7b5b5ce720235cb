"""How an engine makes its weights of the bundle's stored tensors: every form, against the numerics and by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qavp_export.engines.ort import weights
from qavp_export.engines.ort.weights import FORMS, StoredTensor, WeightPlan, read_weights
from qavp_export.errors import BundleError
from qavp_export.numerics.one_level import quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level

Array = npt.NDArray[Any]

# Inputs, outputs and group size of weights. Odd outputs: rows of 4-bit codes begin in the middle of a byte.
SIZES = [(64, 5, 16), (96, 67, 32), (48, 3, 24), (128, 1, 128)]


def _nibbles(values: Array) -> bytes:
    """Two 4-bit integers to a byte, the first in the low half, as ONNX stores them."""
    flat = values.reshape(-1).astype(np.int64) & 15
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.int64)])
    return bytes((flat[0::2] | flat[1::2] << 4).astype(np.uint8))


class _Store:
    """A bundle with one file of tensors; each begins at an odd offset."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.path = bundle / "decoder" / "model.onnx.data"
        self.path.parent.mkdir()
        self.path.write_bytes(b"\xff" * 7)

    def add(self, values: Array, dtype: str) -> StoredTensor:
        """Appends a tensor, and a byte that does not belong to it."""
        data = _nibbles(values) if dtype in ("INT4", "UINT4") else values.tobytes()
        offset = self.path.stat().st_size
        with self.path.open("ab") as file:
            file.write(data + b"\xff")
        return StoredTensor("decoder/model.onnx.data", offset, len(data), dtype, values.shape)

    def make(self, form: str, parts: Mapping[str, StoredTensor], block: int = 0) -> Array:
        """Makes one weight."""
        ((name, value),) = read_weights(self.bundle, [WeightPlan("w", form, parts, block)], threads=1)
        assert name == "w"
        return value


@pytest.fixture
def store(tmp_path: Path) -> _Store:
    return _Store(tmp_path)


@pytest.fixture(params=["one block", "several blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "several blocks":
        # Less than a group of the widest weight; blocks of codes alone begin in the middle of a byte.
        monkeypatch.setattr(weights, "_BLOCK", 105)


def _random(inputs: int, outputs: int) -> Array:
    rng = np.random.default_rng(inputs + outputs)
    weight = rng.standard_normal((outputs, inputs)) * rng.uniform(0.01, 5, (outputs, inputs))
    weight[0, :16] = 0
    return weight.astype(np.float32)


def _two_level(store: _Store, quantized: TwoLevel) -> dict[str, StoredTensor]:
    return {
        "codes": store.add(quantized.codes.T, "INT4"),
        "multipliers": store.add(quantized.multipliers.T, "UINT4"),
        "steps": store.add(quantized.steps, "FLOAT"),
    }


def _check_sign_flipped(unsigned: Array, signed: Array) -> None:
    assert unsigned.dtype == np.uint8
    np.testing.assert_array_equal(unsigned.astype(np.int32) - 128, signed)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("inputs", "outputs", "group"), SIZES)
def test_products_are_codes_times_multipliers(store: _Store, inputs: int, outputs: int, group: int) -> None:
    quantized = quantize_two_level(_random(inputs, outputs), group)
    parts = _two_level(store, quantized)
    del parts["steps"]
    expected = quantized.codes.astype(np.int32) * np.repeat(quantized.multipliers.astype(np.int32), group, axis=1)
    products = store.make("products", parts, group)
    assert products.dtype == np.int8
    np.testing.assert_array_equal(products, expected.T)
    # With the steps they are the weight.
    np.testing.assert_array_equal(products.T.astype(np.float32) * quantized.steps[:, None], _exact(quantized))
    _check_sign_flipped(store.make("unsigned_products", parts, group), expected.T)


def _exact(quantized: TwoLevel) -> Array:
    """The weight with codes and multipliers multiplied first, as integers."""
    multipliers = np.repeat(quantized.multipliers, quantized.codes.shape[1] // quantized.multipliers.shape[1], axis=1)
    return (quantized.codes * multipliers.astype(np.float32)) * quantized.steps[:, None]


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 5), (33, 7)])
@pytest.mark.parametrize(("bits", "dtype"), [(4, "INT4"), (8, "INT8")])
def test_products_without_multipliers_are_the_codes(
    store: _Store, bits: Any, dtype: str, inputs: int, outputs: int
) -> None:
    codes = quantize_one_level(_random(inputs, outputs), inputs, bits).codes.T
    parts = {"codes": store.add(codes, dtype)}
    products = store.make("products", parts, inputs)
    assert products.dtype == np.int8
    np.testing.assert_array_equal(products, codes)
    _check_sign_flipped(store.make("unsigned_products", parts, inputs), codes)


def test_every_4_bit_integer_is_unpacked(store: _Store) -> None:
    # The first 16 bytes that two nibbles can make in each half, in both places.
    signed = np.array([[a, b] for a in range(-8, 8) for b in range(-8, 8)], np.int8)
    np.testing.assert_array_equal(store.make("stored", {"tensor": store.add(signed, "INT4")}), signed)
    np.testing.assert_array_equal(store.make("stored", {"tensor": store.add(signed + 8, "UINT4")}), signed + 8)


def test_packed_4_bits_by_hand(store: _Store) -> None:
    # 4 inputs, 2 outputs, blocks of 2: code c is stored as c + 8, the even input in the low half.
    codes = np.array([[-8, 7], [0, 1], [3, -1], [-2, 5]])
    packed = store.make("packed4", {"codes": store.add(codes, "INT4")}, 2)
    np.testing.assert_array_equal(packed, [[[0x80], [0x6B]], [[0x9F], [0xD7]]])


def test_packed_8_bits_by_hand(store: _Store) -> None:
    codes = np.array([[-128, 127], [0, 1], [3, -1], [-2, 5]], np.int8)
    packed = store.make("packed8", {"codes": store.add(codes, "INT8")}, 2)
    np.testing.assert_array_equal(packed, [[[0, 128], [131, 126]], [[255, 129], [127, 133]]])


def test_block_scales_by_hand(store: _Store) -> None:
    # 2 groups, 3 outputs: all groups of an output follow one another.
    multipliers, steps = np.array([[1, 2, 3], [15, 5, 4]]), np.array([0.5, 2, 8], np.float32)
    parts = {"multipliers": store.add(multipliers, "UINT4"), "steps": store.add(steps, "FLOAT")}
    np.testing.assert_array_equal(store.make("block_scales", parts), [0.5, 7.5, 4, 10, 24, 32])
    scales = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    made = store.make("block_scales", {"scales": store.add(scales, "FLOAT")})
    np.testing.assert_array_equal(made, [1, 4, 2, 5, 3, 6])
    assert made.dtype == np.float32


def _nbits(x: Array, packed: Array, scales: Array, bits: int) -> Array:
    """What ONNX Runtime's MatMulNBits makes of float activations."""
    outputs, blocks = packed.shape[:2]
    inputs = x.shape[1]
    node = helper.make_node(
        "MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=bits, block_size=inputs // blocks, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "nbits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), outputs])],
        [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(64, 5, 16), (96, 67, 32), (128, 1, 128)])
@pytest.mark.parametrize("form", ["packed4, two levels", "packed4, one level", "packed8"])
def test_onnx_runtime_reads_packed_weights_as_the_dequantized_weight(
    store: _Store, form: str, inputs: int, outputs: int, group: int
) -> None:
    weight, x = _random(inputs, outputs), np.random.default_rng(1).standard_normal((3, inputs)).astype(np.float32)
    if form == "packed4, two levels":
        two_level = quantize_two_level(weight, group)
        parts, dequantized, bits = _two_level(store, two_level), two_level.dequantize(), 4
    else:
        bits = int(form[6])
        one_level = quantize_one_level(weight, group, bits)  # type: ignore[arg-type]
        parts = {
            "codes": store.add(one_level.codes.T, f"INT{bits}"),
            "scales": store.add(one_level.scales.T.copy(), "FLOAT"),
        }
        dequantized = one_level.dequantize()
    packed = store.make(f"packed{bits}", {"codes": parts.pop("codes")}, group)
    y = _nbits(x, packed, store.make("block_scales", parts, group), bits)
    # The weight is the same float for float, so the order of at most 128 float32 additions differs.
    bound = np.abs(x).astype(np.float64) @ np.abs(dequantized).T * 2e-6
    assert (np.abs(y - x.astype(np.float64) @ dequantized.T) <= bound).all()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 5), (33, 67), (1, 3)])
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_rounded_is_one_scale_for_each_output(store: _Store, dtype: str, inputs: int, outputs: int) -> None:
    weight = np.ascontiguousarray(np.random.default_rng(2).standard_normal((inputs, outputs)), np.float32)
    weight[:, 1] = 0
    tensor, weight = _half(store, weight, dtype)
    expected = quantize_one_level(weight.T, inputs, 8)
    codes = store.make("rounded", {"tensor": tensor})
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, expected.codes.T)
    scales = store.make("rounded_scales", {"tensor": tensor})
    assert (scales.dtype, scales.shape) == (np.float32, (outputs,))
    # An output of zeros has scale 1 in the reference; its codes are 0.
    np.testing.assert_array_equal(np.where(weight.any(axis=0), scales, 1), expected.scales[:, 0])
    _check_sign_flipped(store.make("unsigned_rounded", {"tensor": tensor}), codes)


def _half(store: _Store, weight: Array, dtype: str) -> tuple[StoredTensor, Array]:
    """Stores a weight in a float type; returns the values that type holds too."""
    if dtype == "FLOAT16":
        return store.add(weight.astype(np.float16), dtype), weight.astype(np.float16).astype(np.float32)
    if dtype == "BFLOAT16":
        bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
        return store.add(bits, dtype), (bits.astype(np.uint32) << 16).view(np.float32)
    return store.add(weight, dtype), weight


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 1)])
def test_widened_keeps_every_value(store: _Store, dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    tensor, expected = _half(store, values, dtype)
    widened = store.make("widened", {"tensor": tensor})
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, expected)


def test_bfloat16_by_hand(store: _Store) -> None:
    tensor = store.add(np.array([0x3F80, 0xC040, 0x0000, 0x3DCD], np.uint16), "BFLOAT16")
    np.testing.assert_array_equal(
        store.make("widened", {"tensor": tensor}), np.array([1, -3, 0, 0.10009765625], np.float32)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_])
def test_stored_and_flat_are_what_is_in_the_file(store: _Store, dtype: type[np.generic]) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    name = {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8", "bool": "BOOL"}[np.dtype(dtype).name]
    parts = {"tensor": store.add(values, name)}
    made = store.make("stored", parts)
    assert made.dtype == dtype
    np.testing.assert_array_equal(made, values)
    np.testing.assert_array_equal(store.make("flat", parts), values.reshape(-1))


def test_weights_come_in_order_whatever_the_number_of_threads(store: _Store) -> None:
    plans = [WeightPlan(f"w{i}", "stored", {"tensor": store.add(np.full(3, i, np.int64), "INT64")}) for i in range(40)]
    for threads in (1, 8):
        made = list(read_weights(store.bundle, plans, threads))
        assert [name for name, _ in made] == [plan.name for plan in plans]
        assert [value.tolist() for _, value in made] == [[i] * 3 for i in range(40)]


def _damaged(store: _Store, form: str) -> WeightPlan:
    codes = store.add(np.ones((32, 6), np.int8), "INT4" if form == "packed4" else "INT8")
    return WeightPlan("layers.0.q_proj", form, {"codes": codes, "tensor": codes}, 16)


@pytest.mark.parametrize("form", ["products", "packed4", "packed8", "stored"])
def test_a_truncated_file_is_an_error_in_one_line(store: _Store, form: str) -> None:
    plan = _damaged(store, form)
    store.path.write_bytes(store.path.read_bytes()[:-9])
    _check_error(store, plan, r"weight 'layers\.0\.q_proj' cannot be read")
    store.path.unlink()
    _check_error(store, plan, r"weight 'layers\.0\.q_proj' cannot be read")


def _check_error(store: _Store, plan: WeightPlan, match: str) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        list(read_weights(store.bundle, [plan], threads=2))
    assert "\n" not in str(caught.value)


def test_an_unknown_form_is_an_error(store: _Store) -> None:
    assert "melted" not in FORMS
    _check_error(store, _damaged(store, "melted"), "has the unknown form 'melted'; export the bundle again")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "STRING"},
        {"shape": (32, 7)},
        {"shape": (1 << 20, 1 << 20)},
        {"shape": (1 << 40, 1 << 40)},
        {"offset": -4},
        {"offset": 1 << 40},
        {"length": 0},
    ],
)
def test_a_plan_that_does_not_fit_the_file_is_an_error(store: _Store, change: Mapping[str, Any]) -> None:
    for form in ("products", "packed8", "stored"):
        plan = _damaged(store, form)
        codes = StoredTensor(**{**vars(plan.parts["codes"]), **change})
        _check_error(store, WeightPlan(plan.name, form, {"codes": codes, "tensor": codes}, 16), "cannot be read")


def test_a_plan_without_its_parts_is_an_error(store: _Store) -> None:
    codes = _damaged(store, "packed8").parts["codes"]
    for form in FORMS:
        _check_error(store, WeightPlan("w", form, {"other": codes}, 16), "cannot be read")
    _check_error(store, WeightPlan("w", "packed8", {"codes": codes}, 0), "cannot be read")
