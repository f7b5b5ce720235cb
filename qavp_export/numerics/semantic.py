"""Semantic relevance of vision tokens: the NumPy reference of the scorers.

Each scorer returns raw relevance; `hybrid_token_score` scales it. Attention scorers recompute what they need
from the queries and keys of one layer, with heads split and no mask.

Sources: `cls`: VisionZip, FasterVLM, VisPruner. `received`: the same idea for towers without a [CLS] token.
`text`: CDPruner (arXiv 2506.10967).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError
from qavp_export.numerics._checks import Float32, as_features, as_float32
from qavp_export.numerics.score import pairwise_sum

Scorer: TypeAlias = Literal["cls", "received", "norm", "random", "text"]

# As torch.nn.functional.normalize.
_SHORTEST = 1e-12


def cls_relevance(q: npt.NDArray[Any], k: npt.NDArray[Any], scale: float | None = None) -> Float32:
    """Attention that the [CLS] query, token 0, pays to each patch: softmax over all T keys, mean over heads.

    Args:
        q: Queries, shape [B, H, T, d], floating point.
        k: Keys, same shape.
        scale: Factor on the logits; 1 / sqrt(d) by default.

    Returns:
        Shape [B, T - 1], float32.

    Raises:
        InputError: Bad shape or dtype; NaN or infinity; no patch besides [CLS].
    """
    queries, keys = _queries_and_keys(q, k, prefix_tokens=1)
    attention = _attention(queries[:, :, :1], keys, scale)
    return _mean(attention[..., 1:])


def received_relevance(
    q: npt.NDArray[Any], k: npt.NDArray[Any], scale: float | None = None, *, prefix_tokens: int = 0
) -> Float32:
    """Attention that each patch receives from all patches: softmax over all T keys, mean over queries, heads.

    Args:
        q: Queries, shape [B, H, T, d], floating point.
        k: Keys, same shape.
        scale: Factor on the logits; 1 / sqrt(d) by default.
        prefix_tokens: Tokens before the first patch (1 with a [CLS]); they do not vote and are not scored.

    Returns:
        Shape [B, T - prefix_tokens], float32.

    Raises:
        InputError: Bad shape or dtype; NaN or infinity; no patch after the prefix.
    """
    queries, keys = _queries_and_keys(q, k, prefix_tokens)
    attention = _attention(queries[:, :, prefix_tokens:], keys, scale)
    return _mean(attention[..., prefix_tokens:])


def norm_relevance(image_features: npt.NDArray[Any]) -> Float32:
    """L2 norm of each projected token.

    Args:
        image_features: Shape [B, N, D], floating point.

    Returns:
        Shape [B, N], float32.

    Raises:
        InputError: Bad shape or dtype; NaN, infinity or values beyond 1e15.
    """
    values = as_features(image_features)
    return np.sqrt(pairwise_sum(values * values))


def random_relevance(seed: int, n_tokens: int) -> Float32:
    """A seeded uniform draw: the control. The same for every image.

    Args:
        seed: Any non-negative integer.
        n_tokens: Tokens per image, N.

    Returns:
        Shape [N], float32 in [0, 1).

    Raises:
        InputError: Negative seed or no token.
    """
    if seed < 0 or n_tokens < 1:
        raise InputError(f"seed is {seed} and n_tokens {n_tokens}; expected seed >= 0 and n_tokens >= 1")
    # A named bit generator: NumPy may change what default_rng draws.
    return np.random.Generator(np.random.PCG64(seed)).random(n_tokens, dtype=np.float32)


def text_relevance(image_embeds: npt.NDArray[Any], text_embeds: npt.NDArray[Any]) -> Float32:
    """Relevance of patches to a question: the cosine of their CLIP embeddings, negated.

    The sign is CDPruner's, and deliberate: CLIP trains [CLS] alone to lie near the text. Its patch tokens do not, and
    those that show what the text names lie farther from it than the background does.

    Args:
        image_embeds: Patch tokens in CLIP's joint space, shape [B, N, P], floating point.
        text_embeds: One question for each image in the same space, shape [B, P], floating point.

    Returns:
        Shape [B, N], float32 in [-1, 1]; 0 where an embedding is zero.

    Raises:
        InputError: Bad shape or dtype; NaN or infinity.
    """
    patches, texts = as_float32("image_embeds", image_embeds, 3), as_float32("text_embeds", text_embeds, 2)
    if (patches.shape[0], patches.shape[2]) != texts.shape:
        raise InputError(
            f"image_embeds has shape {list(patches.shape)} and text_embeds {list(texts.shape)}; expected [B, N, P] and "
            "[B, P]"
        )
    cosines: Float32 = (_unit(patches) * _unit(texts)[:, np.newaxis]).sum(axis=-1, dtype=np.float32)
    return -cosines


def _unit(vectors: Float32) -> Float32:
    """Scales the last axis to length 1; a zero vector stays zero."""
    lengths = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True, dtype=np.float32))
    unit: Float32 = vectors / np.maximum(lengths, np.float32(_SHORTEST))
    return unit


def _queries_and_keys(q: npt.NDArray[Any], k: npt.NDArray[Any], prefix_tokens: int) -> tuple[Float32, Float32]:
    queries, keys = as_float32("q", q, 4), as_float32("k", k, 4)
    if queries.shape != keys.shape:
        raise InputError(f"q has shape {list(queries.shape)} and k {list(keys.shape)}; they must be the same")
    if not 0 <= prefix_tokens < queries.shape[2]:
        raise InputError(f"prefix_tokens is {prefix_tokens}; expected 0 to T - 1 = {queries.shape[2] - 1}")
    return queries, keys


def _mean(attention: Float32) -> Float32:
    """Mean over heads and queries: [B, H, queries, keys] -> [B, keys]."""
    mean: Float32 = attention.mean(axis=(1, 2), dtype=np.float32)
    return mean


def _attention(queries: Float32, keys: Float32, scale: float | None) -> Float32:
    """Attention probabilities, [B, H, queries, keys]."""
    factor = np.float32(queries.shape[-1] ** -0.5 if scale is None else scale)
    logits = (queries @ keys.swapaxes(-1, -2)) * factor
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Float32 = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities
