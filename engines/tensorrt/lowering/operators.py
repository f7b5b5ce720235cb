"""Writes out operators that came with ONNX's opset 23, for parsers that do not take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.attention import static_size
from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.tensorrt.lowering.capabilities import NORM, ROTARY, Capabilities
from qavp_export.errors import GraphError
from qavp_export.passes._builder import Dim, NodeBuilder
from qavp_export.passes._linear import input_of, name_of

# Of the ONNX release that the parser of TensorRT 10.13 was tested with.
_OPSET = 21

_FLOAT, _BOOL = ir.DataType.FLOAT, ir.DataType.BOOL
# What a key that is not seen has for a logit.
_NEVER = np.float32(-1e30)


@dataclass(frozen=True)
class Attending:
    """What attention reads.

    Attributes:
        query: `[B,H,S,d]`.
        keys: `[B,KV,T,d]`.
        values: `[B,KV,T,d]`.
        mask: `[B,1,S,T]` or what is broadcast to it: BOOL, true where a key is seen, or added to the logits; None: all
            are seen.
        scale: Factor on the logits.
        softcap: Logits x become `softcap * tanh(x / softcap)`; 0: as they are.
    """

    query: ir.Value
    keys: ir.Value
    values: ir.Value
    mask: ir.Value | None
    scale: float
    softcap: float = 0.0


def write_out_operators(model: ir.Model, capabilities: Capabilities) -> None:
    """Writes norms and rotary embeddings out in float32 where the parser takes no operators for them.

    Where nothing of opset 23 may be left, the graph is of opset 21. What is no longer used stays in it.

    Args:
        model: A graph; it is changed.
        capabilities: What it may hold.

    Raises:
        GraphError: An operator has a form that is not known here.
    """
    for node in list(model.graph):
        if node.op_type == NORM and NORM not in capabilities.operators:
            _write_out_norm(model.graph, node)
        elif node.op_type == ROTARY and ROTARY not in capabilities.operators:
            _write_out_rotary(model.graph, node)
    if not capabilities.operators and not _has_fp4(model.graph):
        for imports in (model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())):
            imports[""] = min(imports[""], _OPSET)


def write_out_attention(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> str:
    """Writes an `Attention` node out whose inputs and output are FLOAT.

    Args:
        graph: Its graph; the node stays in it, unused.
        node: The node.
        dtype: What its products run in: FLOAT16 or FLOAT.

    Returns:
        The name of the second product.

    Raises:
        GraphError: It has a form that is not known here.
    """
    query = input_of(node, 0)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    rest = [value for value in node.inputs[4:] if value is not None]
    if query.shape is None or len(query.shape) != 4 or rest or node.attributes.get_int("is_causal", 0) == 1:
        raise GraphError(f"attention {node.name!r} is not of a form that is written out")
    scale = node.attributes.get_float("scale", static_size(query, 3) ** -0.5)
    softcap = node.attributes.get_float("softcap", 0.0)
    builder = NodeBuilder(name_of(node))
    attending = Attending(query, input_of(node, 1), input_of(node, 2), mask, scale, softcap)
    result = cast(builder, "output", attend(builder, attending, dtype), _FLOAT)
    graph.insert_before(node, builder.nodes)
    replace_value(node.outputs[0], result)
    return f"{name_of(node)}/MatMul"


def attend(builder: NodeBuilder, attending: Attending, dtype: ir.DataType) -> ir.Value:
    """Writes attention out: its products in a type of floats, everything between them in float32.

    Query heads that share keys are rows of one product. The second product is named `MatMul`.

    Returns:
        `[B,H,S,d]` of that type.

    Raises:
        GraphError: Query heads share keys whose number is not fixed.
    """
    query, keys, values = attending.query, attending.keys, attending.values
    batch, heads, sequence, size = tuple(query.shape or ())
    shared, tokens = tuple(keys.shape or ())[1:3]
    grid = (batch, heads, sequence, tokens)
    is_grouped = shared != heads
    rows: tuple[Dim, ...] = (batch, shared, ir.SymbolicDim("group_rows") if is_grouped else sequence)
    # In front of the product, where it keeps logits of 16 bits from overflowing.
    scale = builder.constant("scale", np.float32(attending.scale))
    scaled = builder.op(
        "scaled", "Mul", [builder.to_float("query_float", query), scale], _FLOAT, tuple(query.shape or ())
    )
    queries = cast(builder, "query", scaled, dtype)
    turned = (batch, shared, size, tokens)
    transposed = builder.op(
        "turned", "Transpose", [cast(builder, "keys", keys, dtype)], dtype, turned, {"perm": (0, 1, 3, 2)}
    )
    if is_grouped:
        queries = _reshape(
            builder, "rows", queries, (0, static_size(keys, 1), -1, static_size(query, 3)), (*rows, size)
        )
    logits = builder.op("logits", "MatMul", [queries, transposed], dtype, (*rows, tokens))
    if is_grouped:
        split = (0, static_size(query, 1), -1, static_size(keys, 2))
        logits = _reshape(builder, "by_head", logits, split, grid)
    seen = _masked(builder, attending, cast(builder, "logits_float", logits, _FLOAT), grid)
    weights = cast(builder, "weights", builder.op("Softmax", "Softmax", [seen], _FLOAT, grid, {"axis": -1}), dtype)
    if is_grouped:
        joined = (0, static_size(keys, 1), -1, static_size(keys, 2))
        weights = _reshape(builder, "grouped", weights, joined, (*rows, tokens))
    attended = builder.op("MatMul", "MatMul", [weights, cast(builder, "values", values, dtype)], dtype, (*rows, size))
    if is_grouped:
        split = (0, static_size(query, 1), -1, static_size(query, 3))
        attended = _reshape(builder, "attended", attended, split, tuple(query.shape or ()))
    return attended


def cast(builder: NodeBuilder, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Adds a Cast where a value is of another type."""
    if value.dtype == dtype:
        return value
    return builder.op(name, "Cast", [value], dtype, tuple(value.shape or ()), {"to": int(dtype)})


def _masked(builder: NodeBuilder, attending: Attending, logits: ir.Value, grid: tuple[Dim, ...]) -> ir.Value:
    mask = attending.mask
    if attending.softcap:
        cap = builder.constant("cap", np.float32(attending.softcap))
        ratio = builder.op("ratio", "Div", [logits, cap], _FLOAT, grid)
        logits = builder.op("capped", "Mul", [builder.op("tanh", "Tanh", [ratio], _FLOAT, grid), cap], _FLOAT, grid)
    if mask is None:
        return logits
    if mask.dtype == _BOOL:
        return builder.op("seen", "Where", [mask, logits, builder.constant("never", _NEVER)], _FLOAT, grid)
    return builder.op("seen", "Add", [logits, builder.to_float("mask", mask)], _FLOAT, grid)


def _reshape(
    builder: NodeBuilder, name: str, value: ir.Value, sizes: tuple[int, ...], shape: tuple[Dim, ...]
) -> ir.Value:
    target = builder.ints(f"{name}_shape", sizes)
    return builder.op(name, "Reshape", [value, target], value.dtype or _FLOAT, shape)


def _write_out_norm(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = input_of(node, 0), input_of(node, 1)
    shape = tuple(x.shape or ())
    if node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1) or x.dtype != _FLOAT:
        raise GraphError(f"norm {node.name!r} is not of a form that is written out")
    builder = NodeBuilder(name_of(node))
    row = (*shape[:-1], 1)
    squares = builder.op("squares", "Mul", [x, x], _FLOAT, shape)
    axes = builder.ints("axes", [-1])
    mean = builder.op("mean", "ReduceMean", [squares, axes], _FLOAT, row, {"keepdims": 1})
    epsilon = builder.constant("epsilon", np.float32(node.attributes.get_float("epsilon", 1e-5)))
    root = builder.op("root", "Sqrt", [builder.op("shifted", "Add", [mean, epsilon], _FLOAT, row)], _FLOAT, row)
    normed = builder.op("normed", "Div", [x, root], _FLOAT, shape)
    result = builder.op("output", "Mul", [normed, builder.to_float("weight", weight)], _FLOAT, shape)
    graph.insert_before(node, builder.nodes)
    replace_value(node.outputs[0], result)


def _write_out_rotary(graph: ir.Graph, node: ir.Node) -> None:
    x, angles = input_of(node, 0), [input_of(node, 1), input_of(node, 2)]
    shape = tuple(x.shape or ())
    has_positions = len(node.inputs) > 3 and node.inputs[3] is not None
    if len(shape) != 4 or has_positions or node.attributes.get_int("interleaved", 0) == 1:
        raise GraphError(f"rotary embedding {node.name!r} is not of a form that is written out")
    builder = NodeBuilder(name_of(node))
    size = static_size(x, 3)
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or size
    half = turned // 2
    by_head = (shape[0], 1, shape[2], half)
    axis = builder.ints("heads_axis", [1])
    cos, sin = (
        builder.op(name, "Unsqueeze", [value, axis], _FLOAT, by_head)
        for name, value in zip(("cos", "sin"), angles, strict=True)
    )
    first, second = (builder.slice(name, x, start, start + half, 3) for name, start in (("first", 0), ("second", half)))
    part = (*shape[:3], half)

    def product(name: str, value: ir.Value, factor: ir.Value) -> ir.Value:
        return builder.op(name, "Mul", [value, factor], _FLOAT, part)

    real = builder.op("real", "Sub", [product("a", first, cos), product("b", second, sin)], _FLOAT, part)
    imaginary = builder.op("imaginary", "Add", [product("c", second, cos), product("d", first, sin)], _FLOAT, part)
    parts = [real, imaginary]
    if turned < size:
        parts.append(builder.slice("rest", x, turned, size, 3))
    result = builder.op("output", "Concat", parts, _FLOAT, shape, {"axis": 3})
    graph.insert_before(node, builder.nodes)
    replace_value(node.outputs[0], result)


def _has_fp4(graph: ir.Graph) -> bool:
    values = [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    return any(value.dtype == ir.DataType.FLOAT4E2M1 for value in values)
