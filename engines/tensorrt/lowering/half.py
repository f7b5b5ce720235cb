"""Runs single nodes of a float32 graph in 16-bit floats: TensorRT fuses the casts into what is around them."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from qavp_export.engines.lowering.values import replace_value
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._linear import name_of

_FLOAT = ir.DataType.FLOAT
_FLOATS = frozenset({_FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class HalfProducts:
    """Casts what nodes of one graph read and write.

    Args:
        graph: The graph; nodes are taken in its order.
        dtype: FLOAT16 or BFLOAT16.
    """

    def __init__(self, graph: ir.Graph, dtype: ir.DataType = ir.DataType.FLOAT16) -> None:
        self._graph = graph
        self._dtype = dtype
        self._cast: dict[ir.Value, ir.Value] = {}

    def run_in_half(self, node: ir.Node) -> None:
        """Lets a node compute in 16 bits; what is around it stays as it is."""
        before = NodeBuilder(f"{name_of(node)}/{self._dtype.name.lower()}")
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in _FLOATS:
                node.replace_input_with(index, self._halved(value, before))
        self._graph.insert_before(node, before.nodes)
        result = node.outputs[0]
        after = NodeBuilder(f"{name_of(node)}/float")
        wide = after.op("output", "Cast", [result], _FLOAT, tuple(result.shape or ()), {"to": int(_FLOAT)})
        self._graph.insert_after(node, after.nodes)
        replace_value(result, wide)
        # Its own cast is a reader like the others.
        after.nodes[0].replace_input_with(0, result)
        result.type = ir.TensorType(self._dtype)

    def _halved(self, value: ir.Value, builder: NodeBuilder) -> ir.Value:
        stored = stored_weight(value)
        if stored is not None:
            return halved_weight(self._graph, stored, self._dtype)
        if value.dtype == self._dtype:
            return value
        if value not in self._cast:
            shape, attributes = tuple(value.shape or ()), {"to": int(self._dtype)}
            self._cast[value] = builder.op(
                f"input_{len(builder.nodes)}", "Cast", [value], self._dtype, shape, attributes
            )
        return self._cast[value]


def stored_weight(value: ir.Value) -> ir.Value | None:
    """Returns the initializer behind a value, through a cast; None if it is computed."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value if value.is_initializer() else None


def halved_weight(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Returns an initializer as one of 16 bits; it is cast when the graph is written."""
    if value.dtype == dtype:
        return value
    return lazy_initializer(graph, f"{value.name}.{dtype.name.lower()}", value, dtype)


def lazy_initializer(graph: ir.Graph, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Returns an initializer with the values of another in a type of its own; one that is there already is returned."""
    if name not in graph.initializers:
        shape = ir.Shape(value.shape or ())
        tensor = ir.LazyTensor(partial(_converted, value, dtype, name), dtype=dtype, shape=shape, name=name)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor))
    return graph.initializers[name]


def _converted(value: ir.Value, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    if value.const_value is None:
        raise TypeError(f"{value.name} has no values")
    array = value.const_value.numpy().astype(dtype.numpy())
    release(value)
    return ir.tensor(array, dtype=dtype, name=name)


def release(value: ir.Value) -> None:
    """Lets go of the file that a weight was read from."""
    if isinstance(value.const_value, ir.ExternalTensor):
        value.const_value.release()
