"""Intervals and tests for figures that are compared: bootstrap intervals, McNemar's exact test.

Every function that draws takes a seed: the same values give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError

Floats: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = Sequence[float] | Sequence[bool] | npt.NDArray[Any]
Statistic: TypeAlias = Callable[[Floats], Floats]
"""What is estimated: reduces the last axis of `[..., n]`, such as `mean` or `percentile(90)`."""

RESAMPLES = 2000
LEVEL = 0.95

_CHUNK = 1 << 20  # values drawn at once: 8 MB of indices


@dataclass(frozen=True)
class Interval:
    """An estimate between its bounds.

    Attributes:
        estimate: The statistic of the values as they are.
        low: Lower bound.
        high: Upper bound.
    """

    estimate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Returns the three as JSON values."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class McNemar:
    """How two arms differ on the same yes-or-no outcomes.

    Attributes:
        only_a: Outcomes that are true in `a` alone.
        only_b: Outcomes that are true in `b` alone.
        p: Two-sided exact p value: how often a fair coin splits the differing outcomes at least as unevenly.
    """

    only_a: int
    only_b: int
    p: float


def mean(values: Floats) -> Floats:
    """The mean over the last axis."""
    return np.asarray(values.mean(axis=-1), np.float64)


def percentile(q: float) -> Statistic:
    """Returns the statistic that is the q-th percentile, 0 to 100, over the last axis."""
    return lambda values: np.asarray(np.percentile(values, q, axis=-1), np.float64)


def bootstrap_interval(
    values: Numbers, statistic: Statistic, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """Percentile bootstrap interval of a statistic (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

    Args:
        values: Independent values `[n]`.
        statistic: What is estimated.
        seed: Seed of the resampling.
        resamples: How often values are drawn with replacement.
        level: Coverage, in (0, 1).

    Raises:
        InputError: No values, not one axis, NaN or infinity, or a level or number of resamples out of range.
    """
    (array,) = _checked(resamples, level, values)
    rng = np.random.default_rng(seed)
    draws = [statistic(array[indices]) for indices in _indices(rng, len(array), resamples)]
    return _interval(statistic(array), np.concatenate(draws), level)


def paired_bootstrap(
    a: Numbers,
    b: Numbers,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    statistic: Statistic = mean,
) -> Interval:
    """Interval of `statistic(a) - statistic(b)` where `a[i]` and `b[i]` belong together: pairs are resampled whole.

    Args:
        a: Values `[n]`.
        b: Values `[n]`, in the same order.
        seed: Seed of the resampling.
        resamples: How often pairs are drawn with replacement.
        level: Coverage, in (0, 1).
        statistic: What is compared.

    Raises:
        InputError: As `bootstrap_interval`, or the lengths differ.
    """
    first, second = _checked(resamples, level, a, b)
    _check_paired(first, second)
    rng = np.random.default_rng(seed)
    draws = [statistic(first[indices]) - statistic(second[indices]) for indices in _indices(rng, len(first), resamples)]
    return _interval(statistic(first) - statistic(second), np.concatenate(draws), level)


def ratio_interval(
    a: Numbers,
    b: Numbers,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    statistic: Statistic = mean,
    *,
    paired: bool = False,
) -> Interval:
    """Interval of `statistic(a) / statistic(b)`, for positive values such as times.

    Args:
        a: Values `[n]`, above 0.
        b: Values `[m]`, above 0.
        seed: Seed of the resampling.
        resamples: How often values are drawn with replacement.
        level: Coverage, in (0, 1).
        statistic: What is compared.
        paired: Whether `a[i]` and `b[i]` belong together (measured in the same round, or on the same input).

    Raises:
        InputError: As `bootstrap_interval`, a value that is not above 0, or pairs of different lengths.
    """
    first, second = _checked(resamples, level, a, b)
    if min(first.min(), second.min()) <= 0:
        raise InputError("a ratio needs values above 0; remove those that are not")
    if paired:
        _check_paired(first, second)
    rng = np.random.default_rng(seed)
    draws_a = _indices(rng, len(first), resamples)
    if paired:
        draws = [statistic(first[indices]) / statistic(second[indices]) for indices in draws_a]
        return _interval(statistic(first) / statistic(second), np.concatenate(draws), level)
    above = np.concatenate([statistic(first[indices]) for indices in draws_a])
    below = np.concatenate([statistic(second[indices]) for indices in _indices(rng, len(second), resamples)])
    return _interval(statistic(first) / statistic(second), above / below, level)


def mcnemar(a: Numbers, b: Numbers) -> McNemar:
    """McNemar's exact test: under no difference, each outcome that differs is as likely to favour either.

    Source: McNemar, Psychometrika 12 (1947), with binomial instead of chi-square probabilities.

    Args:
        a: Outcomes, 0 or 1 `[n]`.
        b: Outcomes of the same questions, 0 or 1 `[n]`.

    Raises:
        InputError: Other values than 0 and 1, no values, or the lengths differ.
    """
    first, second = _checked(1, LEVEL, a, b)
    _check_paired(first, second)
    if not np.isin(first, (0, 1)).all() or not np.isin(second, (0, 1)).all():
        raise InputError("McNemar's test is for outcomes 0 and 1; round scores first")
    only_a = int(np.count_nonzero(first > second))
    only_b = int(np.count_nonzero(second > first))
    return McNemar(only_a, only_b, _sign_test(only_a, only_b))


def _sign_test(above: int, below: int) -> float:
    """Two-sided p value of a fair coin; in integers, so that no number of flips loses a digit."""
    flips = above + below
    term = tail = 1
    for heads in range(1, min(above, below) + 1):
        term = term * (flips - heads + 1) // heads
        tail += term
    return min(1.0, 2 * tail / (1 << flips))


def _checked(resamples: int, level: float, *samples: Numbers) -> list[Floats]:
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"{resamples} resamples at level {level} make no interval; give at least 1, and 0 < level < 1")
    arrays = [np.asarray(values, np.float64) for values in samples]
    for array in arrays:
        if array.ndim != 1 or not len(array):
            raise InputError(f"an interval needs a list of values, not shape {list(array.shape)}")
        if not math.isfinite(float(np.abs(array).max())):
            raise InputError("an interval needs finite values; there is NaN or infinity among them")
    return arrays


def _check_paired(a: Floats, b: Floats) -> None:
    if len(a) != len(b):
        raise InputError(f"pairs need as many values on both sides, not {len(a)} and {len(b)}")


def _indices(rng: np.random.Generator, n: int, resamples: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yields indices of resamples, `[some, n]` at a time, so that memory does not grow with their number."""
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(0, n, (min(rows, resamples - start), n))


def _interval(estimate: Floats, draws: Floats, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))
