"""The vision encoder's contract when nothing is pruned."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._infra import (
    RewritePass,
    RewriteResult,
    find_value,
    insert_behind,
    require_features,
    require_free_name,
    token_grid,
    with_shapes,
)
from qavp_export.passes.relevance import drop_relevance
from qavp_export.passes.select_gather import KEPT_INDICES


class KeepAllTokens(RewritePass):
    """Adds the output `kept_indices [B,N]` = 0, 1, ..., N-1 to a vision graph that keeps all tokens.

    The input `patch_relevance` and the output `token_relevance`, where a graph has them, go: nothing is scored.

    Args:
        at: The value `[B,N,D]` whose tokens are counted; N is a number, or has a name.

    Raises:
        GraphError: When called: the graph lacks the features or a known N, or has the output already.
    """

    def __init__(self, at: str = "image_features") -> None:
        super().__init__()
        self.at = at

    def requires(self, model: ir.Model) -> None:
        """Checks that the features are there and were not selected from."""
        require_features(model, self.at)
        require_free_name(model, KEPT_INDICES)

    def call(self, model: ir.Model) -> RewriteResult:
        """Adds the output; see the class."""
        features = find_value(model, self.at)
        tokens, _ = with_shapes(model, lambda: token_grid(features))
        drop_relevance(model)
        builder = NodeBuilder("/keep_all")
        rows = features.shape[0] if features.shape is not None else ir.SymbolicDim("batch")
        raster, shape = _static(builder, features, tokens) if isinstance(tokens, int) else _dynamic(builder, features)
        indices = builder.op("Expand", "Expand", [raster, shape], ir.DataType.INT64, [rows, tokens])
        indices.name = KEPT_INDICES
        insert_behind(model.graph, features, builder.nodes)
        model.graph.outputs.append(indices)
        return RewriteResult(model, modified=True, matched=1)


def _static(builder: NodeBuilder, features: ir.Value, tokens: int) -> tuple[ir.Value, ir.Value]:
    """0, 1, ..., N-1 and the shape `[B,N]`, N a number."""
    int64 = ir.DataType.INT64
    batch = builder.op("Shape", "Shape", [features], int64, [1], {"start": 0, "end": 1})
    shape = builder.op("Concat", "Concat", [batch, builder.ints("tokens", [tokens])], int64, [2], {"axis": 0})
    return builder.constant("raster", np.arange(tokens, dtype=np.int64)), shape


def _dynamic(builder: NodeBuilder, features: ir.Value) -> tuple[ir.Value, ir.Value]:
    """0, 1, ..., N-1 and the shape `[B,N]`, N as the features have it."""
    int64, tokens = ir.DataType.INT64, token_grid(features)[0]
    shape = builder.op("Shape", "Shape", [features], int64, [2], {"start": 0, "end": 2})
    last = builder.constant("last", np.asarray(1, dtype=np.int64))
    count = builder.op("Tokens", "Gather", [shape, last], int64, [], {"axis": 0})
    first, step = (builder.constant(name, np.asarray(value, np.int64)) for name, value in (("first", 0), ("step", 1)))
    return builder.op("Range", "Range", [first, count, step], int64, [tokens]), shape
