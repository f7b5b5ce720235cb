"""Keeps 16-bit weights 16-bit on disk."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qavp_export.passes._infra import RewritePass, RewriteResult

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class StoreHalf(RewritePass):
    """Stores float32 initializers that came from 16-bit tensors in their own precision, without loss.

    1. An initializer named in `dtypes` with a 16-bit type and rank >= 2 is stored in that type.
    2. Where it is a table (`Gather` from it along axis 0), the `Cast` to float32 follows the gather, so that only
       the rows that are used are converted; everywhere else the `Cast` precedes its use.

    Vectors (biases, norm gains) stay float32: they are small, and a cast each would only add nodes.

    Args:
        dtypes: The dtype on disk by initializer name.
    """

    def __init__(self, dtypes: Mapping[str, ir.DataType]) -> None:
        super().__init__()
        self.dtypes = dict(dtypes)

    def call(self, model: ir.Model) -> RewriteResult:
        """Rewrites every named initializer of the main graph."""
        graph = model.graph
        matched = 0
        for name, dtype in self.dtypes.items():
            value = graph.initializers.get(name)
            if value is None or dtype not in _HALF or value.dtype != ir.DataType.FLOAT:
                continue
            if value.shape is None or len(value.shape) < 2 or value.is_graph_output():
                continue
            _store(graph, value, dtype)
            matched += 1
        return RewriteResult(model, modified=matched > 0, matched=matched, refused=[])


def _store(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    users = list(value.uses())
    tensor = value.const_value
    if tensor is None:
        raise TypeError(f"initializer {value.name} has no tensor")
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(np.asarray(tensor.numpy()).astype(dtype.numpy(), order="C"), dtype=dtype, name=value.name),
        dtype=dtype,
        shape=tensor.shape,  # type: ignore[arg-type]  # an initializer's shape is static
        name=value.name,
    )
    value.type = ir.TensorType(dtype)
    shared: ir.Value | None = None
    for node, index in users:
        if node.op_type == "Gather" and index == 0:
            node.outputs[0].type = ir.TensorType(dtype)  # clones share the one that is there
            _cast_after(graph, node)
            continue
        if shared is None:
            cast = _cast(f"{node.name}/weight/Cast", value)
            graph.insert_before(node, cast)
            shared = cast.outputs[0]
        node.replace_input_with(index, shared)


def _cast_after(graph: ir.Graph, node: ir.Node) -> None:
    gathered = node.outputs[0]
    cast = _cast(f"{node.name}/Cast", gathered)
    graph.insert_after(node, cast)
    if gathered.is_graph_output():
        # The interface keeps its name.
        cast.outputs[0].name, gathered.name = gathered.name, f"{gathered.name}.stored"
    gathered.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    cast.replace_input_with(0, gathered)


def _cast(name: str, value: ir.Value) -> ir.Node:
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = value.shape
    return node
