"""Widens weights that are stored in 16 bits, when the engine loads instead of in the graph."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.ort.lowering.weights import WeightPlans
from qavp_export.errors import GraphError

_FLOAT = ir.DataType.FLOAT
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def widen_halves(graph: ir.Graph, plans: WeightPlans) -> None:
    """Replaces initializers of 16 bits, and the casts behind them.

    Args:
        graph: A canonical graph; what is no longer used stays in it.
        plans: Takes the weights.

    Raises:
        GraphError: A 16-bit weight is read by an operator that is not known here.
    """
    for value in list(graph.initializers.values()):
        if value.dtype not in HALF or value.shape is None:
            continue
        sizes = value.shape.numpy()
        wide = plans.add(graph, f"{value.name}.widened", "widened", {"tensor": value}, _FLOAT, sizes)
        _read_wide(value, wide)


def _read_wide(half: ir.Value, wide: ir.Value) -> None:
    for node, index in list(half.uses()):
        if node.op_type == "Cast":
            replace_value(node.outputs[0], wide)
        elif node.op_type == "Gather" and index == 0:
            # Rows of a table are cast behind it.
            rows = node.outputs[0]
            if wide is not half:
                node.replace_input_with(0, wide)
            # A new type: clones share the one that is there.
            rows.type = ir.TensorType(_FLOAT)
            _read_wide(rows, rows)
        else:
            raise GraphError(f"{node.op_type} {node.name!r} reads the 16-bit weight {half.name!r}; export again")
