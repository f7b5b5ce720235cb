"""Intervals against distributions that are known, p values against counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from qavp_export.errors import InputError
from qavp_export.statistics import (
    best_of_p,
    bootstrap_interval,
    mcnemar,
    mean,
    paired_bootstrap,
    percentile,
    ratio_interval,
)


def test_interval_of_two_values_is_that_of_their_four_resamples() -> None:
    # Means 0, 0.5, 0.5, 1: quantiles 0.025 and 0.975 are 0 and 1, quantiles 0.3 and 0.7 are 0.5.
    wide = bootstrap_interval([0, 1], mean, 0)
    assert (wide.estimate, wide.low, wide.high) == (0.5, 0, 1)
    narrow = bootstrap_interval([0, 1], mean, 0, level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_interval_of_a_mean_has_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(1).exponential(size=900)
    found = bootstrap_interval(values, mean, 0, resamples=8000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    # A quantile of 8,000 resamples strays by about 2% of the half width, the distribution's skew by about as much.
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_many_values_are_resampled_in_parts_as_few_are() -> None:
    # 3,000 values make parts of 349 resamples, the last of them not whole.
    values = np.random.default_rng(2).normal(size=3000)
    found = bootstrap_interval(values, mean, 0, resamples=1000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)  # 1,000 resamples: about 4% of noise


def test_pairs_are_resampled_together() -> None:
    a = np.random.default_rng(3).normal(0, 100, 50)
    found = paired_bootstrap(a + 1, a, 0)
    # Sums of numbers near 100 are exact to 1e-12.
    assert found.estimate == pytest.approx(1, abs=1e-10)
    assert found.low == pytest.approx(1, abs=1e-10)
    assert found.high == pytest.approx(1, abs=1e-10)


def test_percentiles_and_ratios() -> None:
    a = np.arange(1.0, 102)
    assert bootstrap_interval(a, percentile(90), 0).estimate == 91
    paired = ratio_interval(2 * a, a, 0, statistic=percentile(50), paired=True)
    assert (paired.estimate, paired.low, paired.high) == (2, 2, 2)
    free = ratio_interval(2 * a, a, 0, statistic=percentile(50))
    assert free.low < free.estimate == 2 < free.high
    # Independent samples: the delta method's variance of the ratio of two means.
    means = ratio_interval(2 * a, a, 0, resamples=8000)
    half = 1.959964 * 2 * math.sqrt(2) * a.std() / math.sqrt(len(a)) / a.mean()
    # The ratio is skewed, which moves both ends up: the width is right to the skew's second order.
    assert means.high - means.low == pytest.approx(2 * half, rel=0.1)


def test_a_seed_gives_the_same_interval_and_another_gives_another() -> None:
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_interval(values, mean, 5) == bootstrap_interval(values, mean, 5)
    assert bootstrap_interval(values, mean, 5) != bootstrap_interval(values, mean, 6)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 1), (2, 2), (0, 6), (7, 4)])
def test_p_is_the_share_of_coin_sequences_at_least_as_uneven(only_a: int, only_b: int) -> None:
    flips = only_a + only_b
    sequences = list(itertools.product((0, 1), repeat=flips))
    as_uneven = [s for s in sequences if abs(2 * sum(s) - flips) >= abs(only_a - only_b)]
    a = [1] * only_a + [0] * only_b + [1, 0]
    b = [0] * only_a + [1] * only_b + [1, 0]
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == len(as_uneven) / len(sequences)


def test_p_of_thousands_of_differences() -> None:
    a = np.arange(4000) < 2100
    # The normal approximation with continuity correction, good to 1% in the body.
    z = (abs(2100 - 1900) - 1) / math.sqrt(4000)
    assert mcnemar(a, ~a).p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


@pytest.mark.parametrize(
    ("gains", "p"),
    [
        # Of 32 flips only the one that flips nothing has a sum of 5.
        ([[1, 1, 1, 1, 1]], [1 / 32]),
        # Sums of 3 and more: no flip, or one of five.
        ([[2, 2, 2, 2, -2]], [6 / 32]),
        # The second candidate reaches 5 with one more flip. 3 and more: at most one sign differs from +++++, or from
        # ++++-, which is one flip away: 6 + 6 - 2.
        ([[1, 1, 1, 1, 1], [3, 3, 3, 3, -3]], [2 / 32, 10 / 32]),
        # The same candidate twice is one; what equals the baseline is reached by all flips.
        ([[1, 1, 1, 1, 1], [7, 7, 7, 7, 7], [0, 0, 0, 0, 0]], [1 / 32, 1 / 32, 1]),
        # No flip has a smaller sum.
        ([[-1, -1, -1]], [1]),
        ([[4]], [1 / 2]),
        # 9 is reached by 9 and 11, and not by -9 and -11.
        ([[10, -1]], [2 / 4]),
    ],
)
def test_p_of_the_best_of_several_counts_flips(gains: list[list[float]], p: list[float]) -> None:
    np.testing.assert_array_equal(best_of_p(gains, 0), p)


def test_p_of_drawn_flips() -> None:
    # 40 equal gains, 26 of them positive: a fair coin falls so 26 times or more with this chance.
    p = sum(math.comb(40, heads) for heads in range(26, 41)) / 2**40
    found = best_of_p([[1.0] * 26 + [-1.0] * 14], 0)[0]
    # 8,192 flips: the standard error is 0.0021.
    assert found == pytest.approx(p, abs=0.009)
    assert best_of_p([[1.0] * 26 + [-1.0] * 14], 0)[0] == found
    # What no drawn flip reaches is reached by what was measured.
    assert best_of_p([[1.0] * 40], 0)[0] == 1 / 8192


def test_the_best_of_many_that_differ_by_chance_is_rarely_significant() -> None:
    rng = np.random.default_rng(6)
    # 12 candidates, 10 images, no difference: one candidate alone would pass its own test in 5 of 100 cases.
    smallest = [best_of_p(rng.standard_normal((12, 10)), 0).min() for _ in range(400)]
    share = np.mean(np.array(smallest) <= 0.05)
    # Exact at 0.05 but for ties; the standard error of 400 is 0.011.
    assert 0.017 <= share <= 0.083


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: bootstrap_interval([], mean, 0), "list of values"),
        (lambda: bootstrap_interval(np.ones((1, 1)), mean, 0), "list of values"),
        (lambda: bootstrap_interval([1, math.nan], mean, 0), "NaN"),
        (lambda: bootstrap_interval([1], mean, 0, level=1), "level 1"),
        (lambda: bootstrap_interval([1], mean, 0, resamples=0), "0 resamples"),
        (lambda: paired_bootstrap([1, 2], [1], 0), "2 and 1"),
        (lambda: ratio_interval([1, 2], [0, 1], 0), "above 0"),
        (lambda: ratio_interval([1, 2], [1], 0, paired=True), "2 and 1"),
        (lambda: best_of_p([1, 2], 0), r"a table of gains, not shape \[2\]"),
        (lambda: best_of_p(np.ones((0, 3)), 0), r"a table of gains, not shape \[0, 3\]"),
        (lambda: best_of_p([[1, math.inf]], 0), "infinity"),
        (lambda: mcnemar([0.5], [1]), "0 and 1"),
        (lambda: mcnemar([1, 1], [1]), "2 and 1"),
    ],
)
def test_bad_values_are_refused(call, match) -> None:
    with pytest.raises(InputError, match=match):
        call()
