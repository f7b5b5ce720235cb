"""Semantic scorers against hand-computed attention and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qavp_export.errors import InputError
from qavp_export.numerics.semantic import (
    cls_relevance,
    norm_relevance,
    random_relevance,
    received_relevance,
    text_relevance,
)

# One head of size 1, so logits are q * k. exp(ln 3) = 3: q = 1 has the row [1, 3, 1] / 5, q = 0 a uniform one.
QUERIES = np.array([1.0, 1.0, 0.0], np.float32).reshape(1, 1, 3, 1)
KEYS = np.array([0.0, math.log(3), 0.0], np.float32).reshape(1, 1, 3, 1)


def _random_heads(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 2, 3, 10, 8)).astype(np.float32)
    return q, k


def test_cls_by_hand() -> None:
    np.testing.assert_allclose(cls_relevance(QUERIES, KEYS, 1.0), [[3 / 5, 1 / 5]], rtol=1e-6)


def test_received_by_hand_with_cls() -> None:
    expected = [[(3 / 5 + 1 / 3) / 2, (1 / 5 + 1 / 3) / 2]]
    np.testing.assert_allclose(received_relevance(QUERIES, KEYS, 1.0, prefix_tokens=1), expected, rtol=1e-6)


def test_received_by_hand_without_cls() -> None:
    other, middle = (1 / 5 + 1 / 5 + 1 / 3) / 3, (3 / 5 + 3 / 5 + 1 / 3) / 3
    np.testing.assert_allclose(received_relevance(QUERIES, KEYS, 1.0), [[other, middle, other]], rtol=1e-6)


def test_attention_scorers_equal_torch() -> None:
    q, k = _random_heads(0)
    # The default scale is 1 / sqrt(8).
    attention = torch.softmax(torch.tensor(q) @ torch.tensor(k).mT / math.sqrt(8), dim=-1)
    cls = attention[:, :, 0, 1:].mean(dim=1).numpy()
    received = attention[:, :, 1:, 1:].mean(dim=(1, 2)).numpy()
    np.testing.assert_allclose(cls_relevance(q, k), cls, rtol=1e-5)
    np.testing.assert_allclose(received_relevance(q, k, prefix_tokens=1), received, rtol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    q, k = _random_heads(1)
    relevance = cls_relevance(q * 1e4, k * 1e4)
    assert np.isfinite(relevance).all()
    assert relevance.max() <= 1


def test_norm_by_hand() -> None:
    v = np.array([[[3.0, 4.0], [0.0, 0.0]]], np.float32)
    np.testing.assert_array_equal(norm_relevance(v), [[5.0, 0.0]])


def test_random_is_seeded_and_fixed_for_good() -> None:
    # The same recipe must make the same bundle next year: the numbers are pinned.
    np.testing.assert_allclose(random_relevance(0, 3), [0.850624, 0.636962, 0.511136], atol=1e-5)
    assert not np.array_equal(random_relevance(1, 8), random_relevance(2, 8))
    assert random_relevance(3, 8).dtype == np.float32


def test_bad_input_is_refused() -> None:
    q, k = _random_heads(2)
    with pytest.raises(InputError, match="they must be the same"):
        cls_relevance(q, k[:, :, :5])
    with pytest.raises(InputError, match="expected 4 dimensions"):
        cls_relevance(q[0], k)
    with pytest.raises(InputError, match="prefix_tokens is 1"):
        cls_relevance(q[:, :, :1], k[:, :, :1])
    with pytest.raises(InputError, match="prefix_tokens is 10"):
        received_relevance(q, k, prefix_tokens=10)
    with pytest.raises(InputError, match="k holds nan"):
        cls_relevance(q, k * np.nan)
    with pytest.raises(InputError, match="seed is -1"):
        random_relevance(-1, 4)


def test_text_by_hand() -> None:
    # Lengths do not count; along the text: cosine 1; at right angles: 0; 3-4-5: 3 / 5; against it: -1; zero: 0.
    patches = np.array([[[2, 0], [0, 7], [3, 4], [-5, 0], [0, 0]]], np.float32)
    text = np.array([[0.5, 0]], np.float32)
    np.testing.assert_allclose(text_relevance(patches, text), [[-1, 0, -0.6, 1, 0]], atol=1e-7)


def test_text_equals_torch_and_every_image_has_its_own_question() -> None:
    rng = np.random.default_rng(4)
    patches, texts = rng.standard_normal((3, 7, 20)).astype(np.float32), rng.standard_normal((3, 20)).astype(np.float32)
    expected = -torch.cosine_similarity(torch.tensor(patches), torch.tensor(texts)[:, None], dim=-1).numpy()
    # float32 sums of 20 products, in another order.
    np.testing.assert_allclose(text_relevance(patches, texts), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 19), (2, 20)])
def test_text_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"image_embeds has shape \[3, 7, 20\] and text_embeds"):
        text_relevance(np.ones((3, 7, 20), np.float32), np.ones(shape, np.float32))
