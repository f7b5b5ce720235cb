"""What is added to logits for keys that are not seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qavp_export.passes._builder import Dim, NodeBuilder

_BOOL, _FLOAT, _INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT64
# What a key that is not seen adds to its logit.
NEVER = np.float32(-1e30)


def causal_bias(
    builder: NodeBuilder, keys: ir.Value, queries: ir.Value, window: int | None, shape: Sequence[Dim]
) -> ir.Value:
    """Returns 0 for keys up to a query's own, within the window, and a very negative number for others.

    Args:
        builder: Takes the nodes.
        keys: Their positions `[T]` INT64.
        queries: Theirs `[...,1]` INT64.
        window: Number of last keys that are seen, the query's own among them; None: all.
        shape: Of the result `[...,T]`.
    """
    seen = builder.op("LessOrEqual", "LessOrEqual", [keys, queries], _BOOL, shape)
    if window is not None:
        width = builder.constant("width", np.int64(window))
        before = builder.op("Sub", "Sub", [queries, width], _INT64, (*tuple(shape)[:-1], 1))
        within = builder.op("Greater", "Greater", [keys, before], _BOOL, shape)
        seen = builder.op("And", "And", [seen, within], _BOOL, shape)
    nothing, never = builder.constant("nothing", np.float32(0)), builder.constant("never", NEVER)
    return builder.op("Where", "Where", [seen, nothing, never], _FLOAT, shape)
