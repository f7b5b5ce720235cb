"""Selection against hand-computed values and a plain sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qavp_export.errors import InputError
from qavp_export.numerics.select import select_topk, tokens_to_keep


@pytest.mark.parametrize(
    ("n", "keep", "kept"),
    [
        (576, 0.125, 72),
        (256, 0.125, 32),
        (25, 0.1, 3),
        (25, 0.5, 13),
        (10, 0.01, 1),
        (7, 1.0, 7),
        (1, 0.5, 1),
    ],
)
def test_tokens_to_keep_by_hand(n: int, keep: float, kept: int) -> None:
    assert tokens_to_keep(n, keep) == kept


@given(st.integers(1, 5000), st.floats(0, 1, exclude_min=True))
def test_tokens_to_keep_is_in_range(n: int, keep: float) -> None:
    assert 1 <= tokens_to_keep(n, keep) <= n


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_keep_outside_its_range_is_refused(keep: float) -> None:
    with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
        tokens_to_keep(10, keep)


def test_survivors_are_in_raster_order_and_per_image() -> None:
    score = np.array([[0.1, 0.9, 0.3, 0.8], [0.9, 0.1, 0.2, 0.0]], np.float32)
    np.testing.assert_array_equal(select_topk(score, 2), [[1, 3], [0, 2]])
    assert select_topk(score, 2).dtype == np.int64


def test_ties_go_to_the_lower_index() -> None:
    score = np.array([[0.5, 0.7, 0.5, 0.7, 0.5], [0.0, -0.0, 0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(select_topk(score, 3), [[0, 1, 3], [0, 1, 2]])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
def test_topk_equals_a_sort_by_score_then_index(levels: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(levels)))
    best = sorted(range(len(levels)), key=lambda index: (-levels[index], index))[:k]
    score = np.array([levels], np.float32)
    np.testing.assert_array_equal(select_topk(score, k), [sorted(best)])


def test_bad_input_is_refused() -> None:
    score = np.zeros((1, 4), np.float32)
    for k in (0, 5):
        with pytest.raises(InputError, match=f"k is {k}"):
            select_topk(score, k)
    with pytest.raises(InputError, match="score holds nan"):
        select_topk(score * np.nan, 2)
    with pytest.raises(InputError, match="0 tokens"):
        tokens_to_keep(0, 0.5)
