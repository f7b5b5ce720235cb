"""Cuts the language-model head off a decoder, and lets a decoder finish only the positions whose logits are wanted."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from qavp_export.engines.lowering.activation import find_activation
from qavp_export.engines.lowering.attention import AttentionSite
from qavp_export.engines.lowering.values import replace_value
from qavp_export.errors import GraphError
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._linear import input_of

HIDDEN = "hidden_states"
POSITIONS = "logit_positions"

_INT64 = ir.DataType.INT64
_ROWS = ir.SymbolicDim("rows")
_WEIGHT_OPS = frozenset({"Cast", "DequantizeLinear", "Mul", "Transpose"})


def split_head(model: ir.Model) -> tuple[ir.Model, ir.Model]:
    """Cuts a decoder in front of its last linear layer.

    Args:
        model: A canonical decoder; it is not changed.

    Returns:
        The decoder with the output `hidden_states [B,S,D]` in the place of `logits`, and the head, of which it is the
        input.

    Raises:
        GraphError: No linear layer makes the logits.
    """
    body, head = model.clone(), model.clone()
    hidden = head_input(body.graph)
    outputs = body.graph.outputs
    outputs[next(i for i, value in enumerate(outputs) if value.name == "logits")] = hidden
    of_head = head_input(head.graph)
    entry = ir.Value(name=HIDDEN, shape=of_head.shape, type=of_head.type)
    ir.convenience.replace_all_uses_with(of_head, entry)
    head.graph.outputs[:] = [value for value in head.graph.outputs if value.name == "logits"]
    head.graph.inputs[:] = [entry]
    hidden.name = HIDDEN
    remove_unused(body)
    remove_unused(head)
    return body, head


def gather_rows(graph: ir.Graph, last: AttentionSite, hidden: ir.Value) -> None:
    """Lets a decoder go on behind its last attention with the positions only that a new input names.

    The input is `logit_positions [B,R]` INT64, and the hidden states become `[B,R,D]`. Where values of another form
    enter behind the last attention, the hidden states themselves are gathered.

    Args:
        graph: The decoder, with or without its head.
        last: The attention of its last layer.
        hidden: What the head reads `[B,S,D]`.
    """
    positions = ir.Value(name=POSITIONS, shape=ir.Shape([ir.SymbolicDim("batch"), _ROWS]), type=ir.TensorType(_INT64))
    graph.inputs.append(positions)
    first = _joined(last)
    inner = set() if first is None else _between(first, hidden)
    # What else is read there, in the order of the graph.
    crossing = list(
        dict.fromkeys(
            value
            for node in graph
            if node in inner
            for value in node.inputs
            if value is not None
            and value is not first
            and not value.is_initializer()
            and not _is_constant(value)
            and value.producer() not in inner
        )
    )
    if first is None or not all(_is_sequence(value) for value in crossing):
        _gather(graph, hidden, positions, "hidden")
        return
    for node in inner:
        for output in node.outputs:
            if output.shape is not None and _is_sequence(output):
                output.shape = ir.Shape([output.shape[0], _ROWS, *tuple(output.shape)[2:]])
    for number, value in enumerate([first, *crossing]):
        _gather(graph, value, positions, f"{number}", readers=inner)


def remove_unused(model: ir.Model) -> None:
    """Removes what no output depends on: nodes, initializers, functions, inputs."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # onnx-ir leaves its __init__ untyped
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


def _gather(
    graph: ir.Graph, value: ir.Value, positions: ir.Value, name: str, readers: set[ir.Node] | None = None
) -> None:
    """Puts rows of `[B,S,C]` in its place, where `readers` read it or everywhere."""
    builder = NodeBuilder(f"/{POSITIONS}/{name}")
    shape = tuple(value.shape or ())
    index = builder.op("Unsqueeze", "Unsqueeze", [positions, builder.ints("axis", [-1])], _INT64, (shape[0], _ROWS, 1))
    rows = builder.op(
        "GatherND", "GatherND", [value, index], value.dtype or ir.DataType.FLOAT, (shape[0], _ROWS, shape[2])
    )
    rows_node = rows.producer()
    if rows_node is not None:
        rows_node.attributes["batch_dims"] = ir.AttrInt64("batch_dims", 1)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], builder.nodes)
    else:
        graph.insert_after(producer, builder.nodes)
    if readers is None:
        replace_value(value, rows)
        if rows_node is not None:
            rows_node.replace_input_with(0, value)
        return
    for node in readers:
        for position, read in enumerate(node.inputs):
            if read is value:
                node.replace_input_with(position, rows)


def head_input(graph: ir.Graph) -> ir.Value:
    """Returns what the last linear layer of a decoder reads, before it is quantized.

    Raises:
        GraphError: No linear layer makes the logits.
    """
    value = next(value for value in graph.outputs if value.name == "logits")
    while (node := value.producer()) is not None:
        if node.op_type == "MatMul" and _is_weight(input_of(node, 1)):
            activation = find_activation(input_of(node, 0))
            return input_of(node, 0) if activation is None else activation.x
        value = input_of(node, 0)
    raise GraphError("no linear layer makes the decoder's logits")


def _is_weight(value: ir.Value) -> bool:
    while not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in _WEIGHT_OPS:
            return False
        value = input_of(node, 0)
    return True


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is made of constants and initializers only."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return all(_is_constant(read) for read in node.inputs if read is not None)


def _is_sequence(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and len(shape) == 3 and str(shape[1]) == "sequence"


def _joined(site: AttentionSite) -> ir.Value | None:
    """Returns attention's output by token `[B,S,H*d]`."""
    for turned in site.output.consumers():
        for joined in turned.outputs[0].consumers():
            if joined.op_type == "Reshape" and _is_sequence(joined.outputs[0]):
                return joined.outputs[0]
    return None


def _between(start: ir.Value, end: ir.Value) -> set[ir.Node]:
    """Returns the nodes on the paths from one value to another."""
    found: dict[ir.Node, bool] = {}

    def reaches(value: ir.Value) -> bool:
        if value is end:
            return True
        hits = []
        for node in value.consumers():
            if node not in found:
                found[node] = False
                # Every path is walked: `any` would stop at the first that arrives.
                found[node] = sum(reaches(output) for output in node.outputs) > 0
            hits.append(found[node])
        return any(hits)

    reaches(start)
    return {node for node, hit in found.items() if hit}
