"""The vision encoder's contract when nothing is pruned."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qavp_export.errors import GraphError
from qavp_export.passes._infra import RewritePass, RewriteResult


class KeepAllTokens(RewritePass):
    """Adds the output `kept_indices [B,N]` = 0, 1, ..., N-1 to a vision graph that keeps all tokens.

    Args:
        at: The value `[B,N,D]` whose tokens are counted; N is static.
    """

    def __init__(self, at: str = "image_features") -> None:
        super().__init__()
        self.at = at

    def requires(self, model: ir.Model) -> None:
        """Checks that the graph has the output, with a static number of tokens.

        Raises:
            GraphError: It has not.
        """
        self._tokens(model)

    def call(self, model: ir.Model) -> RewriteResult:
        """Adds the output; see the class."""
        graph = model.graph
        features, tokens = self._tokens(model)
        raster = _constant(graph, "/keep_all/raster", np.arange(tokens, dtype=np.int64))
        axis = _constant(graph, "/keep_all/tokens", np.array([tokens], dtype=np.int64))
        batch = ir.node("Shape", [features], {"start": 0, "end": 1}, name="/keep_all/Shape")
        shape = ir.node("Concat", [batch.outputs[0], axis], {"axis": 0}, name="/keep_all/Concat")
        indices = ir.node("Expand", [raster, shape.outputs[0]], name="/keep_all/Expand")
        output = indices.outputs[0]
        output.name, output.dtype = "kept_indices", ir.DataType.INT64
        output.shape = ir.Shape((features.shape[0], tokens)) if features.shape is not None else None
        graph.extend([batch, shape, indices])
        graph.outputs.append(output)
        return RewriteResult(model, modified=True, matched=1)

    def _tokens(self, model: ir.Model) -> tuple[ir.Value, int]:
        value = next((output for output in model.graph.outputs if output.name == self.at), None)
        if value is None:
            raise GraphError(f"the graph has no output {self.at!r}; name the vision projector's output")
        if value.shape is None or len(value.shape) != 3 or not isinstance(value.shape[1], int):
            raise GraphError(f"{self.at} has shape {value.shape}, not [B,N,D] with a static N")
        return value, value.shape[1]


def _constant(graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    graph.register_initializer(value)
    return value
