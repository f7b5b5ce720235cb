"""Finds a decoder's residual stream: what reads it through a norm, and what adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from qavp_export.errors import GraphError
from qavp_export.passes._linear import input_of, is_linear


@dataclass(frozen=True)
class Norm:
    """An RMSNormalization of the stream, and the linear layers that read it.

    Attributes:
        node: The norm; input 1 is its gain.
        readers: The linear layers; nothing else reads the norm.
    """

    node: ir.Node
    readers: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Writer:
    """A linear layer whose output is added to the stream.

    Attributes:
        node: The linear layer.
        bias: What is added to its output first, an initializer; None if there is none.
    """

    node: ir.Node
    bias: ir.Value | None


@dataclass
class ResidualStream:
    """A residual stream.

    Attributes:
        start: Where it begins.
        consumers: Nodes that read the stream's start itself: norms and additions.
        norms: In graph order.
        writers: In graph order.
    """

    start: ir.Value
    consumers: list[ir.Node] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)

    def linears(self) -> Iterator[ir.Node]:
        """Yields every linear layer that reads or writes the stream."""
        for norm in self.norms:
            yield from norm.readers
        for writer in self.writers:
            yield writer.node


def find_residual_stream(graph: ir.Graph, start: ir.Value) -> ResidualStream:
    """Follows the stream from its start through every addition and norm.

    Args:
        graph: A decoder's main graph.
        start: The embeddings, `[..., D]`.

    Raises:
        GraphError: Something reads the stream that is neither an RMSNormalization before linear layers, nor the
            addition of a linear layer's output; the message names it.
    """
    stream = ResidualStream(start)
    values = {start}
    for node in graph:
        read = [value for value in node.inputs if value in values]
        if not read or node.op_type == "Shape":
            continue
        if node.op_type == "RMSNormalization" and read == [node.inputs[0]]:
            stream.norms.append(_norm(node))
        elif node.op_type == "Add" and len(read) == 1:
            other = next(value for value in node.inputs if value not in values)
            stream.writers.append(_writer(other, node))
            values.add(node.outputs[0])
        else:
            raise _unknown(node, "reads the residual stream")
        if start in read:
            stream.consumers.append(node)
    ends = [value for value in values if value.is_graph_output()]
    if ends or not stream.norms:
        raise GraphError(f"{start.name} does not lead through RMSNormalization nodes to linear layers")
    # What a branch or a loop reads is not among the main graph's nodes.
    for user in (user for value in values for user, _ in value.uses()):
        if user.graph is not graph:
            raise _unknown(user, "reads the residual stream in a subgraph")
    _check_weights(stream)
    return stream


def bias_of(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Splits `Add(x, bias)` into `x` and a `bias [K]` of its own; `(value, None)` for anything else."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Add":
        for x, bias in (node.inputs, reversed(node.inputs)):
            if bias is None or not bias.is_initializer() or len(bias.uses()) != 1:
                continue
            width = _width(bias, 1)
            if width is not None and width == _width(x):
                return x, bias
    return value, None


def _width(value: ir.Value | None, rank: int | None = None) -> int | None:
    """Returns the static last axis; None if there is none, or if the rank is another."""
    shape = value.shape if value is not None else None
    if shape is None or len(shape) != (rank or len(shape)) or not len(shape):
        return None
    return shape[-1] if isinstance(shape[-1], int) else None


def only_reader(value: ir.Value) -> bool:
    """Whether one node reads a value, nothing else does, and it is no graph output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _norm(node: ir.Node) -> Norm:
    gain, output = input_of(node, 1), node.outputs[0]
    if not gain.is_initializer() or output.is_graph_output():
        raise _unknown(node, "has a gain that is no constant, or is an output")
    for user, index in output.uses():
        if not is_linear(user) or user.op_type != "MatMul" or index != 0:
            raise _unknown(user, f"reads the norm {node.name}")
    return Norm(node, tuple(user for user, _ in output.uses()))


def _writer(value: ir.Value | None, addition: ir.Node) -> Writer:
    product, bias = bias_of(value)
    node = product.producer() if product is not None else None
    if node is None or node.op_type != "MatMul" or not is_linear(node):
        raise _unknown(addition, "adds something to the residual stream that is no linear layer's output")
    chain = [product, value] if bias is not None else [value]
    if not all(link is not None and only_reader(link) for link in chain):
        raise _unknown(node, "has an output that is used elsewhere too")
    return Writer(node, bias)


def _check_weights(stream: ResidualStream) -> None:
    for node in stream.linears():
        weight = input_of(node, 1)
        if len(weight.uses()) != 1 or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            raise _unknown(node, "has a weight that is shared or not FLOAT")
    for x in (stream.start, *(input_of(writer.node, 0) for writer in stream.writers)):
        if _width(x) is None:
            raise GraphError(f"{x.name} has no known width; run shape inference first")


def _unknown(node: ir.Node, what: str) -> GraphError:
    return GraphError(f"{node.name} ({node.op_type}) {what}")
