"""The selection kernels in Triton's interpreter against the NumPy reference, index for index."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qavp_export.engines.kernels.select import rows_shape, select_dpp_spec, select_grid, select_maxmin_spec
from qavp_export.engines.kernels.similarity import (
    token_codes_grid,
    token_codes_spec,
    token_products_grid,
    token_products_spec,
)
from qavp_export.errors import InputError
from qavp_export.numerics.diverse import FLOOR, FULL, UNIT, Diversity, choose_diverse, code_width, token_codes
from tests.kernels.interpreter import Array, Interpreter
from tests.token_sets import draw_tokens

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
BOTH: list[Diversity] = ["dpp", "maxmin"]
# Numbers behind the last, which no program may write.
GUARD = 7
POISON = -77


def _poisoned(count: int, dtype: type, value: float) -> Array:
    return np.full(count + GUARD, value, dtype)


def _inside(result: Array, shape: tuple[int, ...]) -> Array:
    """What a kernel may write; the rest must be as it was."""
    count = int(np.prod(shape))
    behind = result[count:]
    assert np.isnan(behind).all() if result.dtype.kind == "f" else (behind == POISON).all()
    return result[:count].reshape(shape)


def _codes(interpreter: Interpreter, features: Array, dtype: str) -> Array:
    images, tokens, width = features.shape
    shape = images, tokens, code_width(width)
    arguments = {"features": features, "codes": _poisoned(int(np.prod(shape)), np.int8, POISON)}
    results = interpreter.run(token_codes_spec(dtype, width), token_codes_grid(images * tokens), arguments)
    return _inside(results["codes"], shape)


def _products(interpreter: Interpreter, codes: Array) -> Array:
    images, tokens, width = codes.shape
    shape = images, tokens, tokens
    arguments = {"codes": codes, "products": _poisoned(images * tokens * tokens, np.float32, np.nan)}
    results = interpreter.run(token_products_spec(tokens, width), token_products_grid(images, tokens), arguments)
    return _inside(results["products"], shape)


def _choose(
    interpreter: Interpreter, select: Diversity, products: Array, score: Array, kept: int
) -> tuple[Array, Array]:
    images, tokens = score.shape
    chosen = {name: _poisoned(images * kept, np.int32, POISON) for name in ("indices", "order")}
    arguments: dict[str, Array] = {"products": products}
    spec = select_maxmin_spec(tokens, kept)
    if select == "dpp":
        spec = select_dpp_spec(tokens, kept, use_ptx=False)
        scratch = images, *rows_shape(tokens, kept)
        chosen["rows"] = _poisoned(int(np.prod(scratch)), np.float32, np.nan)
        arguments["score"] = score
    results = interpreter.run(spec, select_grid(images), {**arguments, **chosen})
    order = _inside(results["order"], (images, kept))
    if select == "dpp":
        rows = _inside(results["rows"], scratch)[:, :kept, :tokens]
        for image in range(images):
            np.testing.assert_array_equal(rows[image], _cholesky(products[image], order[image]))
    return _inside(results["indices"], (images, kept)), order


def _cholesky(products: Array, order: Array) -> Array:
    """The reference's rows for a choice: indices alone hide how most of them are rounded."""
    square = np.diagonal(products)
    scale = np.float32(UNIT) / np.sqrt(np.maximum(square, np.float32(1)))
    rest = np.where(square > 0, np.float32(FULL), np.float32(FLOOR))
    rows = np.zeros((len(order), len(products)), np.float32)
    for step, j in enumerate(order):
        limit = np.sqrt(rest)
        row = (products[j] * (scale * scale[j]) - rows[:, j] @ rows) / limit[j]
        rows[step] = np.rint(np.clip(row, -limit, limit))
        rest = np.maximum(rest - rows[step] * rows[step], np.float32(FLOOR))
    return rows


def _products_of(codes: Array) -> Array:
    wide = codes.astype(np.float64)
    return (wide @ wide.swapaxes(1, 2)).astype(np.float32)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("width", [5, 48, 300, 1152, 4096, 4099])
def test_codes_are_the_reference_ones(interpreter: Interpreter, dtype: str, width: int) -> None:
    for seed in (0, 2, 6, 9, 10):
        features = draw_tokens(seed, 2, 9, width)[0].astype(NUMPY[dtype])
        np.testing.assert_array_equal(_codes(interpreter, features, dtype), token_codes(features))


@pytest.mark.parametrize(("images", "tokens", "width"), [(1, 1, 1), (2, 63, 48), (1, 65, 300), (2, 130, 131)])
def test_products_are_integers(interpreter: Interpreter, images: int, tokens: int, width: int) -> None:
    codes = np.random.default_rng(tokens).integers(-64, 65, (images, tokens, width)).astype(np.int8)
    np.testing.assert_array_equal(_products(interpreter, codes), _products_of(codes))


def test_the_largest_products_are_exact(interpreter: Interpreter) -> None:
    codes = np.full((1, 2, 4096), 64, np.int8)
    codes[0, 1, 0] = 63
    assert _products(interpreter, codes).tolist() == [[[2**24, 2**24 - 64], [2**24 - 64, 2**24 - 127]]]


@pytest.mark.parametrize("select", BOTH)
@pytest.mark.parametrize(("tokens", "width", "inputs"), [(1, 48, 3), (7, 5, 44), (20, 96, 11), (37, 131, 11)])
def test_choices_are_the_reference_ones(
    interpreter: Interpreter, tokens: int, width: int, inputs: int, select: Diversity
) -> None:
    # Rows of 37 tokens come to more than one step of the loop over rows.
    for seed in range(inputs):
        x, score = draw_tokens(seed, 2, tokens, width)
        kept = (tokens, 1, max(1, tokens // 3), max(1, tokens - 1))[seed % 4]
        indices, order = _choose(interpreter, select, _products_of(token_codes(x)), score, kept)
        expected = choose_diverse(select, x, score, kept)
        np.testing.assert_array_equal(order, expected, err_msg=f"input {seed}")
        np.testing.assert_array_equal(indices, np.sort(expected, axis=-1), err_msg=f"input {seed}")


@pytest.mark.parametrize("width", [131, 1500])
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("select", BOTH)
def test_the_launches_together(interpreter: Interpreter, select: Diversity, dtype: str, width: int) -> None:
    for seed in (0, 2, 5, 6):
        x, score = draw_tokens(seed, 2, 23, width)
        features = x.astype(NUMPY[dtype])
        products = _products(interpreter, _codes(interpreter, features, dtype))
        _, order = _choose(interpreter, select, products, score, 19)
        np.testing.assert_array_equal(order, choose_diverse(select, features, score, 19), err_msg=f"input {seed}")


@pytest.mark.parametrize("select", BOTH)
def test_the_sizes_of_a_7b_model(interpreter: Interpreter, select: Diversity) -> None:
    rng = np.random.default_rng(0)
    # A common direction makes tokens similar, as features are.
    x = rng.standard_normal((1, 576, 4096)) + 2 * rng.standard_normal((1, 1, 4096))
    x, score = x.astype(np.float32), rng.random((1, 576)).astype(np.float32)
    # The interpreter takes a quarter of a second for each.
    _, order = _choose(interpreter, select, _products_of(token_codes(x)), score, 18)
    np.testing.assert_array_equal(order, choose_diverse(select, x, score, 18))


@pytest.mark.parametrize("select", BOTH)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_whatever_the_score_is_the_choice_is_of_different_tokens(
    interpreter: Interpreter, select: Diversity, value: float
) -> None:
    x, score = draw_tokens(0, 2, 9, 48)
    score[:, 3] = value
    indices, order = _choose(interpreter, select, _products_of(token_codes(x)), score, 9)
    assert indices.tolist() == [list(range(9))] * 2
    np.testing.assert_array_equal(np.sort(order, axis=-1), indices)


def test_variants_that_do_not_exist() -> None:
    with pytest.raises(InputError, match="not fp64"):
        token_codes_spec("fp64", 64)
    with pytest.raises(InputError, match="at most 16384 channels, not 16385"):
        token_codes_spec("fp16", 16385)
    with pytest.raises(InputError, match="at most 4096 tokens of an image, not 4097"):
        token_products_spec(4097, 64)
    with pytest.raises(InputError, match="from 1 to all 8 tokens, not 9"):
        select_dpp_spec(8, 9)
    with pytest.raises(InputError, match="from 1 to all 8 tokens, not 0"):
        select_maxmin_spec(8, 0)
