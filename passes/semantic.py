"""Subgraphs of the semantic scorers: `qavp_export.numerics.semantic` in standard operators."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import onnx_ir as ir

from qavp_export.errors import GraphError, InputError
from qavp_export.numerics.semantic import Scorer, random_relevance
from qavp_export.passes._attention import FusedAttention, OpenAttention
from qavp_export.passes._builder import Dim, NodeBuilder
from qavp_export.passes.functions import DOMAIN, TOKEN_NORM

ATTENTION_SCORERS = frozenset({"cls", "received"})


def check_scorer(scorer: str) -> None:
    """Check the name of a scorer.

    Raises:
        InputError: It is none of `cls`, `received`, `norm`, `random`.
    """
    if scorer not in get_args(Scorer):
        raise InputError(f"semantic is {scorer!r}; choose one of {list(get_args(Scorer))}")


def prefix_tokens(site: FusedAttention | OpenAttention, features: str, tokens: int, scorer: str) -> int:
    """How many tokens stand before the first patch: 1 with a [CLS], else 0.

    Args:
        site: The attention of the layer that feeds the projector.
        features: Name of the image features, for messages.
        tokens: Their number of tokens, N.
        scorer: `cls` or `received`.

    Returns:
        0 or 1.

    Raises:
        GraphError: The attention sees other tokens than the features have, or `cls` is asked for without
            a [CLS].
    """
    prefix = site.tokens - tokens
    if prefix not in (0, 1):
        raise GraphError(
            f"attention {site.node.name!r} has {site.tokens} tokens and {features!r} {tokens}; expected "
            "as many, or one more ([CLS]): use semantic 'norm'"
        )
    if scorer == "cls" and prefix == 0:
        raise GraphError(
            f"attention {site.node.name!r} and {features!r} both have {tokens} tokens: the tower has "
            "no [CLS] token; use semantic 'received'"
        )
    return prefix


def attention_relevance(
    builder: NodeBuilder, site: FusedAttention | OpenAttention, batch: Dim, prefix: int, scorer: str
) -> ir.Value:
    """Add what `cls` or `received` needs of an attention, and no more.

    1. Query rows: token 0 for `cls`, all patches for `received`.
    2. Their probabilities: softmax(scale * q k^T) over all T keys, or a Slice of a Softmax that is there.
    3. Mean over heads and rows; the prefix is cut off.

    Args:
        builder: Receives the nodes.
        site: The attention.
        batch: The batch dimension.
        prefix: Tokens before the first patch.
        scorer: `cls` or `received`.

    Returns:
        Relevance `[B,N]`, FLOAT.
    """
    rows = (0, 1) if scorer == "cls" else (prefix, site.tokens)
    if isinstance(site, FusedAttention):
        probabilities = _recompute(builder, site, batch, rows)
    else:
        taken = builder.slice("Rows", site.probabilities, *rows, 2)
        probabilities = builder.to_float("Cast", taken)
    axes = builder.ints("ReduceMean/axes", [1, 2])
    mean = builder.op(
        "ReduceMean",
        "ReduceMean",
        [probabilities, axes],
        ir.DataType.FLOAT,
        [batch, site.tokens],
        {"keepdims": 0},
    )
    return builder.slice("Patches", mean, prefix, site.tokens, 1)


def norm(builder: NodeBuilder, features: ir.Value, batch: Dim, tokens: int) -> ir.Value:
    """Add the scorer `norm`: one `qavp.TokenNorm` node; the caller adds its function.

    Returns:
        Relevance `[B,N]`, FLOAT.
    """
    shape = [batch, tokens]
    return builder.op(TOKEN_NORM, TOKEN_NORM, [features], ir.DataType.FLOAT, shape, domain=DOMAIN)


def random(builder: NodeBuilder, features: ir.Value, batch: Dim, tokens: int, seed: int) -> ir.Value:
    """Add the scorer `random`: a constant draw, the same for every image.

    Returns:
        Relevance `[B,N]`, FLOAT.
    """
    draw = builder.constant("Draw", random_relevance(seed, tokens)[np.newaxis])
    shape = builder.op("Shape", "Shape", [features], ir.DataType.INT64, [2], {"start": 0, "end": 2})
    return builder.op("Expand", "Expand", [draw, shape], ir.DataType.FLOAT, [batch, tokens])


def _recompute(builder: NodeBuilder, site: FusedAttention, batch: Dim, rows: tuple[int, int]) -> ir.Value:
    """Probabilities of some query rows, `[B,H,rows,T]`, in FLOAT whatever the tower's type is."""
    heads, size, count = site.heads, site.head_size, rows[1] - rows[0]
    split = site.query.shape is not None and site.query.shape.rank() == 4
    query = builder.slice("Query", site.query, *rows, 2 if split else 1)
    key = site.key
    if not split:
        query = _split_heads(builder, "Query", query, (batch, count, heads, size))
        key = _split_heads(builder, "Key", key, (batch, site.tokens, heads, size))
    query, key = builder.to_float("Query/Cast", query), builder.to_float("Key/Cast", key)
    float32 = ir.DataType.FLOAT
    transposed = [batch, heads, size, site.tokens]
    key = builder.op("Key/Transpose", "Transpose", [key], float32, transposed, {"perm": [0, 1, 3, 2]})
    shape = [batch, heads, count, site.tokens]
    logits = builder.op("MatMul", "MatMul", [query, key], float32, shape)
    if not math.isclose(site.scale, 1.0):
        scale = builder.constant("scale", np.asarray(site.scale, dtype=np.float32))
        logits = builder.op("Mul", "Mul", [logits, scale], float32, shape)
    return builder.op("Softmax", "Softmax", [logits], float32, shape, {"axis": -1})


def _split_heads(builder: NodeBuilder, name: str, value: ir.Value, sizes: tuple[Dim, int, int, int]) -> ir.Value:
    """`[B,n,H*d]` -> `[B,H,n,d]`."""
    batch, count, heads, size = sizes
    dtype = value.dtype or ir.DataType.FLOAT
    shape = builder.ints(f"{name}/shape", [0, 0, heads, size])
    split = builder.op(f"{name}/Reshape", "Reshape", [value, shape], dtype, sizes)
    swapped = [batch, heads, count, size]
    return builder.op(f"{name}/Swap", "Transpose", [split], dtype, swapped, {"perm": [0, 2, 1, 3]})
