"""Divergence of next-token distributions against values worked out by hand and against torch."""

from __future__ import annotations

import numpy as np
import torch

from qavp_export.numerics.divergence import kl_divergence, log_probabilities


def test_by_hand() -> None:
    # Odds 1 : 2 : 1 and 2 : 1 : 1.
    expected = log_probabilities(np.log([[1.0, 2.0, 1.0]]), banned=7)
    found = log_probabilities(np.log([[2.0, 1.0, 1.0]]), banned=7)
    np.testing.assert_allclose(expected, np.log([[0.25, 0.5, 0.25]]), rtol=1e-14)
    # 0.25 ln(1/2) + 0.5 ln 2.
    np.testing.assert_allclose(kl_divergence(expected, found), [0.25 * np.log(2)], rtol=1e-14)


def test_equals_torch_and_the_banned_token_does_not_count() -> None:
    rng = np.random.default_rng(0)
    p, q = (30 * rng.standard_normal((2, 4, 11))).astype(np.float32)
    q[:, 5] = 1e4
    expected, found = (log_probabilities(logits, banned=5) for logits in (p, q))
    assert np.isneginf(expected[:, 5]).all()
    allowed = np.delete(np.arange(11), 5)
    truth = [torch.from_numpy(logits[:, allowed].astype(np.float64)).log_softmax(-1) for logits in (p, q)]
    np.testing.assert_allclose(found[:, allowed], truth[1].numpy(), atol=1e-12)
    divergence = torch.nn.functional.kl_div(truth[1], truth[0], log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(kl_divergence(expected, found), divergence.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(kl_divergence(expected, expected), np.zeros(4))


def test_what_the_first_rules_out_adds_nothing() -> None:
    with np.errstate(divide="ignore"):
        expected, found = np.log([[1.0, 0.0]]), np.log([[0.5, 0.5]])
    np.testing.assert_allclose(kl_divergence(expected, found), [np.log(2)], rtol=1e-14)
