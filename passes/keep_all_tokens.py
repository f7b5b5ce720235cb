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
from qavp_export.passes.select_gather import KEPT_INDICES


class KeepAllTokens(RewritePass):
    """Adds the output `kept_indices [B,N]` = 0, 1, ..., N-1 to a vision graph that keeps all tokens.

    Args:
        at: The value `[B,N,D]` whose tokens are counted; N is static.

    Raises:
        GraphError: When called: the graph lacks the features or a static N, or has the output already.
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
        int64 = ir.DataType.INT64
        builder = NodeBuilder("/keep_all")
        batch = builder.op("Shape", "Shape", [features], int64, [1], {"start": 0, "end": 1})
        shape = builder.op("Concat", "Concat", [batch, builder.ints("tokens", [tokens])], int64, [2], {"axis": 0})
        raster = builder.constant("raster", np.arange(tokens, dtype=np.int64))
        rows = features.shape[0] if features.shape is not None else "batch"
        indices = builder.op("Expand", "Expand", [raster, shape], int64, [ir.Shape([rows])[0], tokens])
        indices.name = KEPT_INDICES
        insert_behind(model.graph, features, builder.nodes)
        model.graph.outputs.append(indices)
        return RewriteResult(model, modified=True, matched=1)
