"""Sampling against distributions worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qavp_export.errors import QavpError
from qavp_export.runtime.sampling import Sampler, Sampling, sampling_distribution

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
ALL = np.array([True])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
        # top-k first: of the three that stay, 4/9 and 3/9 reach 0.7 together.
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        # temperature first: squared and normalised over 0.3.
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 0.5, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_distribution(options, expected):
    sampling = Sampling(**{"temperature": 1.0, **options})
    # float64 throughout
    np.testing.assert_allclose(sampling_distribution(np.log(PROBABILITIES) + 5, sampling), expected, atol=1e-12)


def test_tiny_temperature_and_huge_logits_stay_finite():
    probabilities = sampling_distribution(np.array([1e30, -np.inf, 3e30]), Sampling(temperature=1e-300))
    assert probabilities.tolist() == [0, 0, 1]


def test_frequencies_follow_the_distribution():
    sampler = Sampler(Sampling(temperature=1.0, seed=0), rows=1, banned=99)
    logits = np.log(PROBABILITIES)[None].astype(np.float32)
    draws = [int(sampler.choose(logits, ALL)[0]) for _ in range(4000)]
    shares = np.bincount(draws, minlength=4) / 4000
    # four standard deviations of a share are at most 4 * sqrt(0.25 / 4000) = 0.032
    np.testing.assert_allclose(shares, PROBABILITIES, atol=0.032)


def test_greedy_takes_the_lowest_of_equals_and_never_the_banned_token():
    logits = np.array([[1, 5, 9, 5]], np.float32)
    assert Sampler(Sampling(), 1, banned=2).choose(logits, ALL).tolist() == [1]
    assert Sampler(Sampling(), 1, banned=99).choose(logits, ALL).tolist() == [2]
    sampler = Sampler(Sampling(temperature=1.0, seed=0), 1, banned=2)
    assert 2 not in [int(sampler.choose(logits, ALL)[0]) for _ in range(50)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error_only_where_they_count(bad):
    logits = np.array([[0, 1], [0, bad]], np.float32)
    assert Sampler(Sampling(), 2, banned=99).choose(logits, np.array([True, False])).tolist() == [1, 0]
    with pytest.raises(QavpError, match="prompt 2"):
        Sampler(Sampling(), 2, banned=99).choose(logits, np.array([True, True]))


def test_rows_draw_from_streams_of_their_own():
    logits = np.zeros((2, 1000), np.float32)
    first = Sampler(Sampling(temperature=1.0, seed=4), 2, banned=2000).choose(logits, np.array([True, True]))
    alone = Sampler(Sampling(temperature=1.0, seed=4), 1, banned=2000).choose(logits[:1], ALL)
    assert first[0] == alone[0]
    assert first[0] != first[1]
