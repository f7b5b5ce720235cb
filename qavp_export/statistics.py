"""Intervals and tests for figures that are compared: bootstrap intervals, McNemar's exact test, sign flips.

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

# All sign flips of so many pairs are tried; of more, as many as these have are drawn.
_ALL_FLIPS = 13
# Of a statistic that is at most the root of the number of pairs: sums in another order are the same statistic.
_SAME = 1e-9

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


def best_of_p(gains: npt.ArrayLike, seed: int) -> Floats:
    """How likely chance alone makes the best of several candidates look at least as good as each of them does.

    If chance alone made the differences, each would be as likely with the other sign. So the signs of all pairs are
    flipped, a pair's for all candidates together, and the largest statistic among the candidates is compared with what
    was measured. Thus the p value also holds for a candidate that was picked because it looked best. The statistic is
    the sum of the gains over the root of their sum of squares, which orders as Student's t does.

    Sources: Fisher, The Design of Experiments (1935), for sign flips; Westfall and Young, Resampling-Based Multiple
    Testing (1993), for the largest of several; Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010), for p values
    of flips that are drawn.

    Args:
        gains: What each candidate gains over the same baseline, pair by pair `[candidates, n]`.
        seed: Seed of the flips, where n is too large to try all.

    Returns:
        One-sided p values `[candidates]`, adjusted for the number of candidates; at least 2^-n, or 2^-13 for larger n.

    Raises:
        InputError: No values, not two axes, NaN or infinity.
    """
    array = np.asarray(gains, np.float64)
    if array.ndim != 2 or not len(array):
        raise InputError(f"candidates need a table of gains, not shape {list(array.shape)}")
    rows = np.stack(_checked(1, LEVEL, *array))
    norms = np.sqrt((rows**2).sum(axis=1))
    # One that never differs from the baseline gains nothing.
    scaled = rows / np.where(norms > 0, norms, 1)[:, np.newaxis]
    measured = scaled.sum(axis=1) - _SAME
    reached, flips = np.zeros(len(rows)), 0
    for signs in _signs(rows.shape[1], seed):
        best = (signs @ scaled.T).max(axis=1)
        reached += (best[:, np.newaxis] >= measured).sum(axis=0)
        flips += len(signs)
    return np.asarray(reached / flips, np.float64)


def _signs(n: int, seed: int) -> Iterator[Floats]:
    """Yields signs `[some, n]`: all there are, or as many drawn ones, beside those that were measured."""
    if n <= _ALL_FLIPS:
        yield _flipped(np.arange(1 << n)[:, np.newaxis] >> np.arange(n) & 1)
        return
    yield np.ones((1, n))
    rng = np.random.default_rng(seed)
    for rows in _parts(n, (1 << _ALL_FLIPS) - 1):
        yield _flipped(rng.integers(0, 2, (rows, n)))


def _flipped(bits: npt.NDArray[np.int64]) -> Floats:
    return np.where(bits == 1, -1.0, 1.0)


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
    """Yields indices of resamples, `[some, n]` at a time."""
    for rows in _parts(n, resamples):
        yield rng.integers(0, n, (rows, n))


def _parts(n: int, resamples: int) -> Iterator[int]:
    """Yields how many resamples of n values are drawn at once, so that memory does not grow with their number."""
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield min(rows, resamples - start)


def _interval(estimate: Floats, draws: Floats, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))
