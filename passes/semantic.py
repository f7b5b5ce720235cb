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
from qavp_export.passes._infra import UnknownShapeError
from qavp_export.passes.functions import DOMAIN, TOKEN_NORM

ATTENTION_SCORERS = frozenset({"cls", "received"})
# More than any supported model makes of one image.
LONGEST_DRAW = 2**14


def check_scorer(scorer: str) -> None:
    """Check the name of a scorer.

    Raises:
        InputError: It is none of `cls`, `received`, `norm`, `random`, `text`.
    """
    if scorer not in get_args(Scorer):
        raise InputError(f"semantic is {scorer!r}; choose one of {list(get_args(Scorer))}")


def prefix_tokens(site: FusedAttention | OpenAttention, features: str, patches: Dim, scorer: str) -> int:
    """How many tokens stand before the first patch: 1 with a [CLS], else 0.

    Where both numbers vary with the image there is nothing to compare: the tower is taken to have no [CLS].

    Args:
        site: The attention of the layer that feeds the projector.
        features: Name of the image features, for messages.
        patches: The number of tokens that are scored by this attention.
        scorer: `cls` or `received`.

    Returns:
        0 or 1.

    Raises:
        GraphError: The attention sees other tokens than the features have, or `cls` is asked for without
            a [CLS]; `UnknownShapeError` where only one of the two numbers is known.
    """
    if not isinstance(site.tokens, int) or not isinstance(patches, int):
        if isinstance(site.tokens, int) or isinstance(patches, int):
            raise UnknownShapeError(
                f"attention {site.node.name!r} has {site.tokens} tokens and {features!r} {patches}, of which one is "
                "not a number; export both static or both dynamic"
            )
        if scorer == "cls":
            raise GraphError(
                f"attention {site.node.name!r} has a varying number of tokens, so a [CLS] among them cannot be told; "
                "use semantic 'received'"
            )
        return 0
    prefix = site.tokens - patches
    if prefix not in (0, 1):
        raise GraphError(
            f"attention {site.node.name!r} has {site.tokens} tokens and {features!r} {patches}; expected "
            "as many, or one more ([CLS]): use semantic 'norm'"
        )
    if scorer == "cls" and prefix == 0:
        raise GraphError(
            f"attention {site.node.name!r} and {features!r} both have {patches} tokens: the tower has "
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
        batch: The attention's batch dimension.
        prefix: Tokens before the first patch.
        scorer: `cls` or `received`.

    Returns:
        Relevance `[B,N]`, FLOAT.
    """
    rows: tuple[int, Dim] = (0, 1) if scorer == "cls" else (prefix, site.tokens)
    if isinstance(site, FusedAttention):
        probabilities = _recompute(builder, site, batch, rows)
    else:
        taken = builder.slice("Rows", site.probabilities, *rows, 2)
        probabilities = builder.to_float("Cast", taken)
    # One axis at a time: ONNX Runtime adds the ten thousand terms of both in a row, on one core.
    dtype, keep = ir.DataType.FLOAT, {"keepdims": 0}
    heads = probabilities.shape[1] if probabilities.shape is not None else ir.SymbolicDim("heads")
    axes = builder.ints("Rows/axes", [2])
    by_head = builder.op(
        "Rows/ReduceMean", "ReduceMean", [probabilities, axes], dtype, [batch, heads, site.tokens], keep
    )
    axes = builder.ints("ReduceMean/axes", [1])
    mean = builder.op("ReduceMean", "ReduceMean", [by_head, axes], dtype, [batch, site.tokens], keep)
    return builder.slice("Patches", mean, prefix, site.tokens, 1)


def norm(builder: NodeBuilder, features: ir.Value, batch: Dim, tokens: Dim) -> ir.Value:
    """Add the scorer `norm`: one `qavp.TokenNorm` node; the caller adds its function.

    Returns:
        Relevance `[B,N]`, FLOAT.
    """
    shape = [batch, tokens]
    return builder.op(TOKEN_NORM, TOKEN_NORM, [features], ir.DataType.FLOAT, shape, domain=DOMAIN)


def random(builder: NodeBuilder, features: ir.Value, batch: Dim, tokens: Dim, seed: int) -> ir.Value:
    """Add the scorer `random`: a constant draw, the same for every image.

    Where N varies, an image takes the first N of a longer draw, which are what a draw of N would be; one of more than
    `LONGEST_DRAW` tokens fails when the graph runs.

    Returns:
        Relevance `[B,N]`, FLOAT.
    """
    length = tokens if isinstance(tokens, int) else LONGEST_DRAW
    draw = builder.constant("Draw", random_relevance(seed, length)[np.newaxis])
    if not isinstance(tokens, int):
        count = builder.op("Count", "Shape", [features], ir.DataType.INT64, [1], {"start": 1, "end": 2})
        bounds = [builder.ints("Draw/start", [0]), count, builder.ints("Draw/axis", [1])]
        draw = builder.op("Draw/Slice", "Slice", [draw, *bounds], ir.DataType.FLOAT, [1, tokens])
    shape = builder.op("Shape", "Shape", [features], ir.DataType.INT64, [2], {"start": 0, "end": 2})
    return builder.op("Expand", "Expand", [draw, shape], ir.DataType.FLOAT, [batch, tokens])


def _recompute(builder: NodeBuilder, site: FusedAttention, batch: Dim, rows: tuple[int, Dim]) -> ir.Value:
    """Probabilities of some query rows, `[B,H,rows,T]`, in FLOAT whatever the tower's type is."""
    heads, size = site.heads, site.head_size
    count = rows[1] - rows[0] if isinstance(rows[1], int) else rows[1]
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


def _split_heads(builder: NodeBuilder, name: str, value: ir.Value, sizes: tuple[Dim, Dim, int, int]) -> ir.Value:
    """`[B,n,H*d]` -> `[B,H,n,d]`."""
    batch, count, heads, size = sizes
    dtype = value.dtype or ir.DataType.FLOAT
    shape = builder.ints(f"{name}/shape", [0, 0, heads, size])
    split = builder.op(f"{name}/Reshape", "Reshape", [value, shape], dtype, sizes)
    swapped = [batch, heads, count, size]
    return builder.op(f"{name}/Swap", "Transpose", [split], dtype, swapped, {"perm": [0, 2, 1, 3]})
