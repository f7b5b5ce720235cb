"""The quantization kernel in Triton's interpreter against the NumPy reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qavp_export.engines.kernels.quantize import quantize_two_level_grid, quantize_two_level_spec
from qavp_export.errors import InputError
from qavp_export.numerics.rotation import block_rotation
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from tests.kernels.interpreter import Array, Interpreter

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
HALF_ULP = 2.0**-24
SIZES = [
    ("fp32", 11008, 128),
    ("fp16", 4096, 128),
    ("bf16", 1152, 128),
    ("fp32", 48, 16),
    ("fp16", 96, 32),
    ("bf16", 320, 64),
    ("fp32", 1536, 512),
    ("fp16", 768, 256),
]


def _activations(width: int, dtype: str) -> Array:
    """Tokens with loud and quiet channels, and what is at the edge: zeros, one outlier, tiny values, half-way cases."""
    draw = np.random.default_rng(width)
    x = draw.standard_normal((7, width)) * np.exp(1.5 * draw.standard_normal((7, width)))
    x[1] = 0.0
    x[2, -1] = 6e4 if dtype == "fp16" else 1e30
    # Denormal, except in bfloat16, where the interpreter flushes them.
    x[3] *= {"fp16": 1e-7, "bf16": 1e-30, "fp32": 1e-42}[dtype]
    # A step of 1 and multipliers of 15: codes are x / 15, half of them half-way.
    x[4] = draw.integers(-14, 15, width) * 7.5
    x[4, 0] = -105.0
    x[5, :-16] = 0.0
    x = np.minimum(x, np.finfo(np.float16).max) if dtype == "fp16" else x
    return x.astype(NUMPY[dtype])


def _quantize(
    interpreter: Interpreter, x: Array, dtype: str, group_size: int, rotate: bool, num_warps: int | None = None
) -> tuple[Array, Array]:
    tokens, width = x.shape
    results = interpreter.run(
        quantize_two_level_spec(dtype, width, group_size, rotate, num_warps),
        quantize_two_level_grid(tokens),
        {"x": x, "products": np.full((tokens + 1, width), -128, np.int8), "steps": np.full(tokens, np.nan, np.float32)},
    )
    # No program may write behind its token, and every product is in [-120, 105].
    assert (results["products"][tokens:] == -128).all()
    assert (results["products"][:tokens] != -128).all()
    return results["products"][:tokens], results["steps"]


def _products(reference: TwoLevel, group_size: int) -> Array:
    multipliers = np.repeat(reference.multipliers.astype(np.int8), group_size, axis=-1)
    return np.asarray(reference.codes * multipliers)


@pytest.mark.parametrize(("dtype", "width", "group_size"), SIZES)
def test_products_and_steps_are_the_references(
    interpreter: Interpreter, dtype: str, width: int, group_size: int
) -> None:
    x = _activations(width, dtype)
    products, steps = _quantize(interpreter, x, dtype, group_size, rotate=False)
    reference = quantize_two_level(x.astype(np.float32), group_size)
    np.testing.assert_array_equal(steps, reference.steps)
    np.testing.assert_array_equal(products, _products(reference, group_size))


def test_a_step_that_is_too_small_for_a_float_is_zero(interpreter: Interpreter) -> None:
    x = np.full((1, 64), 10 * 2.0**-149, np.float32)
    products, steps = _quantize(interpreter, x, "fp32", 16, rotate=False)
    assert steps == 0
    assert (products == 0).all()
    assert (quantize_two_level(x, 16).codes == 0).all()


@pytest.mark.parametrize("num_warps", [1, 4, 8, 16])
def test_any_number_of_warps_will_do(interpreter: Interpreter, num_warps: int) -> None:
    x = _activations(1408, "fp32")
    products, steps = _quantize(interpreter, x, "fp32", 128, False, num_warps)
    reference = quantize_two_level(x, 128)
    np.testing.assert_array_equal(steps, reference.steps)
    np.testing.assert_array_equal(products, _products(reference, 128))


@pytest.mark.parametrize(("width", "group_size"), [(48, 16), (320, 64), (768, 256)])
def test_rotated_integers_are_exact(interpreter: Interpreter, width: int, group_size: int) -> None:
    """Sums of integers are exact, and so is a power of two as the square root: every bit must be the reference's."""
    x = np.random.default_rng(width).integers(-100, 101, (5, width)).astype(np.float32)
    products, steps = _quantize(interpreter, x, "fp32", group_size, rotate=True)
    reference = quantize_two_level(block_rotation(width, group_size).apply(x).astype(np.float32), group_size)
    np.testing.assert_array_equal(steps, reference.steps)
    np.testing.assert_array_equal(products, _products(reference, group_size))


@pytest.mark.parametrize(("dtype", "width", "group_size"), SIZES)
def test_rotated_values_to_rounding(interpreter: Interpreter, dtype: str, width: int, group_size: int) -> None:
    """Each doubling rounds at most three times: once a sum, once twice a value taken from it, once the sum's error.

    So a rotated value is off by at most `(3 log2 G + 2) / 2^24 * norm1(group) / sqrt(G)`. Its code may be the neighbour
    if that much takes its quotient across a half-way case, and its group's multiplier if it takes the amplitude across
    a whole multiple of the step.
    """
    x = _activations(width, dtype)
    products, steps = _quantize(interpreter, x, dtype, group_size, rotate=True)
    rotated = block_rotation(width, group_size).apply(x.astype(np.float64)).reshape(len(x), -1, group_size)
    off = np.abs(x.astype(np.float64)).reshape(rotated.shape).sum(axis=-1) / np.sqrt(group_size)
    off *= (3 * np.log2(group_size) + 2) * HALF_ULP
    exact = quantize_two_level(rotated.reshape(x.shape).astype(np.float32), group_size)
    # Denormal numbers are 2^-149 apart.
    step_off = off.max(axis=-1) / 105 + 4 * HALF_ULP * exact.steps + 2.0**-149
    assert (np.abs(steps - exact.steps) <= step_off).all()

    step = np.where(exact.steps > 0, exact.steps, 1).astype(np.float64)[:, None]
    ratio = np.abs(rotated).max(axis=-1) / 7 / step
    relative = (step_off[:, None] / step) + 4 * HALF_ULP
    near_multiple = np.abs(ratio - np.rint(ratio)) <= off / 7 / step + ratio * relative
    scale = exact.multipliers * step
    quotient = rotated / scale[..., None]
    half_way = np.abs(quotient - np.floor(quotient) - 0.5)
    near_half = half_way <= (off / scale)[..., None] + np.abs(quotient) * relative[..., None]
    differs = products.reshape(rotated.shape) != _products(exact, group_size).reshape(rotated.shape)
    assert not (differs & ~near_half & ~near_multiple[..., None]).any()
    # Tokens of ordinary size, none of them a single outlier spread over its whole block, rarely come near.
    assert differs[[0, 6]].mean() < 1e-3


@pytest.mark.parametrize(
    ("dtype", "width", "group_size", "message"),
    [
        ("fp32", 11008, 172, "not 172"),
        ("fp32", 4096, 8, "not 8"),
        ("fp32", 4096, 1024, "not 1024"),
        ("fp32", 100, 16, "divide the width 100"),
        ("i8", 128, 16, "not i8"),
    ],
)
def test_variants_that_do_not_exist(dtype: str, width: int, group_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_two_level_spec(dtype, width, group_size)
