"""Diverse selection against determinants and distances in float64, and against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from qavp_export.errors import InputError
from qavp_export.numerics.diverse import (
    FLOOR,
    FULL,
    MOST_KEPT,
    UNIT,
    Diversity,
    choose_diverse,
    code_width,
    sketch,
    sketch_signs,
    token_codes,
)
from qavp_export.numerics.select import select_tokens

Floats = npt.NDArray[np.float32]
BOTH: list[Diversity] = ["dpp", "maxmin"]
# Codes move a cosine by about 0.29 / (levels / 3) / sqrt(D) each; twice that for margins to be safe.
NOISE = 0.02


def _draw(seed: int, tokens: int = 12, width: int = 96) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    # A common direction, so that cosines are not all about zero.
    features = rng.standard_normal((1, tokens, width)) + 0.8 * rng.standard_normal((1, 1, width))
    return features.astype(np.float32), rng.random((1, tokens)).astype(np.float32)


def _cosines(features: Floats) -> npt.NDArray[np.float64]:
    unit = features[0].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("seed", range(10))
def test_dpp_takes_the_token_that_makes_the_determinant_largest(seed: int) -> None:
    features, score = _draw(seed)
    quality = (score[0] - score.min()) / (score.max() - score.min()) + 0.1
    kernel = quality[:, None] * _cosines(features) * quality
    chosen = choose_diverse("dpp", features, score, 8)[0].tolist()
    for step, token in enumerate(chosen):
        before = np.linalg.det(kernel[np.ix_(chosen[:step], chosen[:step])])
        gains = {
            other: np.linalg.det(kernel[np.ix_([*chosen[:step], other], [*chosen[:step], other])]) / before
            for other in set(range(12)) - set(chosen[:step])
        }
        assert gains[token] >= max(gains.values()) - NOISE


@pytest.mark.parametrize("seed", range(10))
def test_maxmin_takes_the_token_that_is_farthest_from_the_chosen(seed: int) -> None:
    features, score = _draw(seed)
    distance = 1 - _cosines(features) + np.diag([np.inf] * 12)
    chosen = choose_diverse("maxmin", features, score, 8)[0].tolist()
    assert distance.min(axis=1)[chosen[0]] >= distance.min(axis=1).max() - NOISE
    for step, token in enumerate(chosen[1:], start=1):
        nearest = {other: distance[other, chosen[:step]].min() for other in set(range(12)) - set(chosen[:step])}
        assert nearest[token] >= max(nearest.values()) - NOISE


def test_dpp_by_hand() -> None:
    # Two pairs of duplicates, at a right angle, and one between; w^2 = 1.21, 0.36, 0.36, 1.0, 0.01.
    features = np.array([[[2, 0], [2, 0], [0, 1], [4, 0], [3, 3]]], np.float32)
    score = np.array([[1.0, 0.5, 0.5, 0.9, 0.0]], np.float32)
    # Of 1 and 3 nothing is left; of 4 half; then only quality counts: 1.0, 0.36, 0.01.
    assert choose_diverse("dpp", features, score, 5).tolist() == [[0, 2, 3, 1, 4]]
    assert select_tokens("dpp", features, score, 3).tolist() == [[0, 2, 3]]


def test_maxmin_by_hand() -> None:
    # Cosines to the nearest neighbour: 1, 1, 0.6, 0.28, and zeros count as 1.
    features = np.array([[[1, 0], [3, 0], [0.6, 0.8], [-0.6, 0.8], [0, 0]]], np.float32)
    # After 3, tokens 0 and 1 tie at -0.6; then 2 is at 0.6 from 0, and the duplicate and the zeros tie at 1.
    assert choose_diverse("maxmin", features, np.ones((1, 5)), 5).tolist() == [[3, 0, 2, 1, 4]]


@pytest.mark.parametrize("select", BOTH)
def test_ties_go_to_the_lower_index(select: Diversity) -> None:
    same = np.tile(np.array([0.3, -0.7, 0.2], np.float32), (2, 6, 1))
    constant = np.full((2, 6), 0.5, np.float32)
    assert choose_diverse(select, same, constant, 6).tolist() == [list(range(6))] * 2
    orthogonal = np.eye(6, dtype=np.float32)[None]
    assert choose_diverse(select, orthogonal, constant[:1], 4).tolist() == [[0, 1, 2, 3]]
    assert choose_diverse(select, np.zeros((1, 6, 3), np.float32), constant[:1], 6).tolist() == [list(range(6))]


@pytest.mark.parametrize("select", BOTH)
def test_all_tokens_and_one(select: Diversity) -> None:
    features, score = _draw(3)
    assert sorted(choose_diverse(select, features, score, 12)[0].tolist()) == list(range(12))
    everything = choose_diverse(select, features, score, 12)
    np.testing.assert_array_equal(choose_diverse(select, features, score, 1), everything[:, :1])


@pytest.mark.parametrize("select", BOTH)
def test_no_order_of_summation_and_no_scale_of_a_token_changes_a_choice(select: Diversity) -> None:
    rng = np.random.default_rng(5)
    features, score = _draw(6, tokens=60, width=1024)
    expected = choose_diverse(select, features, score, 60)
    np.testing.assert_array_equal(choose_diverse(select, features[..., rng.permutation(1024)], score, 60), expected)
    # Powers of two change no bit of the codes.
    scaled = features * np.exp2(rng.integers(-20, 20, (1, 60, 1))).astype(np.float32)
    np.testing.assert_array_equal(choose_diverse(select, scaled, score, 60), expected)


def test_half_precision_features_are_taken_as_they_are() -> None:
    features, score = _draw(7)
    half = features.astype(np.float16)
    np.testing.assert_array_equal(
        choose_diverse("dpp", half, score, 6), choose_diverse("dpp", half.astype(np.float32), score, 6)
    )


@pytest.mark.parametrize("width", [1, 3, 64, 1024, 1025, 4096, 5120, 16384])
def test_products_of_codes_fit_float32(width: int) -> None:
    # Raised by 64, as the CPU's form multiplies them; and in pairs in 16 bits, as x86 before VNNI does.
    assert code_width(width) * 128 * 64 < 2**24
    assert 2 * (64 + 128) * 64 < 2**15
    features = np.random.default_rng(width).standard_normal((1, 2, width)).astype(np.float32)
    features[0, 1] = np.sign(features[0, 1])
    codes = token_codes(features)
    assert codes.shape == (1, 2, min(width, 1024))
    assert (np.abs(codes).max(axis=-1) == 64).all()
    if width <= 1024:
        expected = features[0, 0] / np.abs(features[0, 0]).max() * 64
        np.testing.assert_allclose(codes[0, 0], expected, atol=0.5 + 1e-4)


def test_a_sketch_by_hand() -> None:
    # The hash in Python's integers.
    bits = [channel * 0x9E3779B1 % 2**32 for channel in range(5120)]
    signs = [1 - 2 * ((value ^ value >> 15) * 0x85EBCA77 % 2**32 >> 31) for value in bits]
    np.testing.assert_array_equal(sketch_signs(5120), signs)
    # Small integers: no sum is rounded.
    values = np.random.default_rng(0).integers(-9, 10, (2, 3, 5120)).astype(np.float32)
    expected = sum(values[..., at : at + 1024] * signs[at : at + 1024] for at in range(0, 5120, 1024))
    np.testing.assert_array_equal(sketch(values), expected)
    np.testing.assert_array_equal(sketch(values[..., :1024]), values[..., :1024])
    narrow = sketch(values[..., :1030])
    np.testing.assert_array_equal(narrow[..., 6:], values[..., 6:1024] * signs[6:1024])


def test_a_sketch_adds_halves_of_all_channels_first() -> None:
    # One and 2^-24 add up to one, but twice 2^-24 counts.
    values = np.zeros((1, 4096), np.float32)
    values[0, ::1024] = np.array([1, 2**-24, 2**-24, 2**-24]) * sketch_signs(4096)[::1024]
    assert sketch(values)[0, 0] == np.float32(1 + 2**-23)
    values[0, 1024] = 0
    assert sketch(values)[0, 0] == 1


def test_a_sketch_keeps_cosines() -> None:
    # Of 4096 channels in 1024: a standard deviation of at most (1 - 1/4) / 1024, doubled for like tokens: 0.04.
    rng = np.random.default_rng(3)
    features = rng.standard_normal((1, 40, 4096)) + rng.standard_normal((1, 1, 4096)) * np.linspace(0, 3, 40)[:, None]
    features = features.astype(np.float32)
    error = (_cosines(sketch(features)) - _cosines(features))[np.triu_indices(40, 1)]
    assert np.abs(error).max() < 0.16
    assert np.abs(error).mean() < 0.04
    same = np.tile(features[:, :1], (1, 3, 1)) * np.float32([[[1], [3], [-2]]])
    np.testing.assert_array_equal(token_codes(same)[0, 1], token_codes(same)[0, 0])
    np.testing.assert_array_equal(token_codes(same)[0, 2], -token_codes(same)[0, 0])


def test_rows_fit_float32() -> None:
    # What a column gains while something is left of its token, one rounding, and what it may gain after that.
    assert FULL + (UNIT + 0.25) + MOST_KEPT * math.ceil(math.sqrt(FLOOR)) ** 2 < 2**24


def test_a_choice_of_nearly_the_same_features_is_followed_and_no_other() -> None:
    # 0 and 1 are as good as each other but for 1e-4, and nearly the same: whoever is first, the other is last.
    features = np.eye(4, dtype=np.float32)[None, [0, 0, 1, 2, 3]]
    score = np.array([[0.9, 0.8999, 0.3, 0.2, 0.0]], np.float32)
    assert select_tokens("dpp", features, score, 3).tolist() == [[0, 2, 3]]
    assert select_tokens("dpp", features, score, 3, towards=np.array([[1, 2, 3]])).tolist() == [[1, 2, 3]]
    assert select_tokens("dpp", features, score, 3, towards=np.array([[1, 2, 4]])).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("select", BOTH)
def test_no_token_is_chosen_twice_where_nothing_is_left_and_all_are_followed(select: Diversity) -> None:
    # 40 tokens of 3 directions, 10 of zeros; what is left of most is noise.
    features, score = _draw(8, tokens=50, width=3)
    features[0, ::5] = 0
    everything = np.arange(50)[np.newaxis]
    for towards in (None, everything, everything[:, :30]):
        chosen = choose_diverse(select, features, score * 0, 50, towards)
        assert sorted(chosen[0].tolist()) == list(range(50))


@pytest.mark.parametrize("select", BOTH)
def test_bad_input_is_refused(select: Diversity) -> None:
    features, score = _draw(1)
    for k in (0, 13):
        with pytest.raises(InputError, match=f"k is {k}"):
            choose_diverse(select, features, score, k)
    with pytest.raises(InputError, match="features holds nan"):
        choose_diverse(select, features * np.float32("nan"), score, 2)
    with pytest.raises(InputError, match="score holds inf"):
        choose_diverse(select, features, score + np.float32("inf"), 2)
    with pytest.raises(InputError, match=r"score has shape \[1, 11\]; expected \[1, 12\]"):
        choose_diverse(select, features, score[:, 1:], 2)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(InputError, match="select is 'best'"):
        choose_diverse("best", *_draw(1), 2)  # type: ignore[arg-type]
