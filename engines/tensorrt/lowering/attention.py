"""Lowers attention over a growing cache to attention in 16-bit floats over TensorRT's own cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.attention import AttentionSite, CachedTensor, static_size
from qavp_export.engines.lowering.masks import MaskKind
from qavp_export.engines.lowering.values import replace_value
from qavp_export.passes._builder import Dim, NodeBuilder

WRITE_INDICES = "write_indices"
ATTENTION_MASK = "attention_mask"
# The first opset with TensorScatter.
SCATTER_OPSET = 24

_FLOAT, _HALF, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.BOOL
_BATCH, _SEQUENCE = ir.SymbolicDim("batch"), ir.SymbolicDim("sequence")
# What a key that is not seen has for a logit.
_NEVER = np.float32(-1e30)
# A masked logit is below this.
_MASKED = np.float32(np.finfo(np.float32).min / 2)


def lower_attention(
    graph: ir.Graph, sites: Sequence[AttentionSite], kinds: Mapping[str, MaskKind], capacity: int
) -> list[str]:
    """Rewrites attention to write keys and values into the memory that they are read from.

    1. `past_key_values.*` become `[B,KV,capacity,d]` FLOAT16; `present.*` are the same memory behind TensorScatter,
       which TensorRT builds as its key/value cache update. A new input `write_indices [B]` INT64 says how many tokens
       of each sequence the cache holds; sequences are padded on the right.
    2. Attention runs in FLOAT16 on the cache as it is, grouped heads and all; that with capped logits is written out.
    3. A mask that is causal, with or without a window, is computed from places in the cache. Another is that of the
       canonical graph for a prompt in an empty cache, where the input `attention_mask [B,S]` says what is padding, and
       causal behind it.

    What is no longer used stays in the graph.

    Args:
        graph: The decoder.
        sites: Its attention.
        kinds: What the masks let through, by name.
        capacity: Tokens that the cache has memory for; TensorRT takes no other than a fixed number.

    Returns:
        The names of the nodes that stand for attention: `Attention`, or the second product where it is written out.
    """
    write = ir.Value(name=WRITE_INDICES, shape=ir.Shape([_BATCH]), type=ir.TensorType(_INT64))
    graph.inputs.append(write)
    for value in graph.inputs:
        if value.name == ATTENTION_MASK:
            value.shape = ir.Shape([_BATCH, _SEQUENCE])
    _replace_past_shapes(graph, sites)
    for site in sites:
        for tensor in (site.keys, site.values):
            tensor.past.type = ir.TensorType(_HALF)
            tensor.past.shape = ir.Shape([_BATCH, site.heads[1], capacity, site.head_size])
    masks = _Masks(graph, write, capacity)
    nodes = []
    for site in sites:
        mask = masks.of(site.mask, kinds[str(site.mask.name)], _producer(site.output))
        nodes.append(_lower_site(graph, site, write, mask))
    graph.opset_imports[""] = max(graph.opset_imports[""], SCATTER_OPSET)
    return nodes


def _lower_site(graph: ir.Graph, site: AttentionSite, write: ir.Value, mask: ir.Value) -> str:
    anchor = _producer(site.output)
    builder = NodeBuilder(f"{anchor.name}/cached")
    keys, values = (
        _scatter(builder, name, tensor, write) for name, tensor in (("keys", site.keys), ("values", site.values))
    )
    query = _cast(builder, "query", site.query, _HALF)
    if site.softcap:
        attended = _write_out(builder, site, query, keys, values, mask)
    else:
        inputs, shape = [query, keys, values, mask], tuple(site.query.shape or ())
        attended = builder.op("Attention", "Attention", inputs, _HALF, shape, {"scale": site.scale})
    result = _cast(builder, "output", attended, _FLOAT)
    graph.insert_before(anchor, builder.nodes)
    for tensor, present in ((site.keys, keys), (site.values, values)):
        replace_value(tensor.present, present)
    replace_value(site.output, result)
    return f"{anchor.name}/cached/{'MatMul' if site.softcap else 'Attention'}"


def _write_out(
    builder: NodeBuilder, site: AttentionSite, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value
) -> ir.Value:
    """Writes attention with capped logits out, which TensorRT's operator lacks: products in 16 bits, the rest in 32."""
    (heads, shared), size = site.heads, site.head_size
    capacity = static_size(keys, 2)
    rows: tuple[Dim, ...] = (_BATCH, shared, ir.SymbolicDim("group_rows"), size)
    # Query heads that share keys are rows of one product.
    queries = builder.op("rows", "Reshape", [query, builder.ints("rows_shape", [0, shared, -1, size])], _HALF, rows)
    turned = builder.op("turned", "Transpose", [keys], _HALF, (_BATCH, shared, size, capacity), {"perm": (0, 1, 3, 2)})
    logits = builder.op("logits", "MatMul", [queries, turned], _HALF, (*rows[:3], capacity))
    wide = _cast(builder, "logits_float", logits, _FLOAT)
    grid: tuple[Dim, ...] = (_BATCH, heads, _SEQUENCE, capacity)
    by_head = builder.op(
        "by_head", "Reshape", [wide, builder.ints("by_head_shape", [0, heads, -1, capacity])], _FLOAT, grid
    )
    factor = builder.constant("factor", np.float32(site.scale / site.softcap))
    scaled = builder.op("scaled", "Mul", [by_head, factor], _FLOAT, grid)
    tanh = builder.op("tanh", "Tanh", [scaled], _FLOAT, grid)
    capped = builder.op("capped", "Mul", [tanh, builder.constant("cap", np.float32(site.softcap))], _FLOAT, grid)
    seen = builder.op("seen", "Where", [mask, capped, builder.constant("never", _NEVER)], _FLOAT, grid)
    weights = builder.op("Softmax", "Softmax", [seen], _FLOAT, grid, {"axis": -1})
    half = _cast(builder, "weights", weights, _HALF)
    split = builder.ints("split_shape", [0, shared, -1, capacity])
    grouped = builder.op("grouped", "Reshape", [half, split], _HALF, (*rows[:3], capacity))
    joined = builder.op("MatMul", "MatMul", [grouped, values], _HALF, rows)
    target = builder.ints("attended_shape", [0, heads, -1, size])
    return builder.op("attended", "Reshape", [joined, target], _HALF, tuple(site.query.shape or ()))


def _scatter(builder: NodeBuilder, name: str, tensor: CachedTensor, write: ir.Value) -> ir.Value:
    """Writes what is new behind what is there."""
    new = _cast(builder, f"{name}_new", tensor.new, _HALF)
    inputs = [tensor.past, new, write]
    return builder.op(name, "TensorScatter", inputs, _HALF, tuple(tensor.past.shape or ()), {"axis": 2})


class _Masks:
    """Computes what queries see in the cache; layers share it."""

    def __init__(self, graph: ir.Graph, write: ir.Value, capacity: int) -> None:
        self._graph = graph
        self._write = write
        self._capacity = capacity
        self._made: dict[tuple[str | None, int | None], ir.Value] = {}
        self._places: tuple[ir.Value, ir.Value] | None = None

    def of(self, mask: ir.Value, kind: MaskKind, before: ir.Node) -> ir.Value:
        """Returns `[B,1,S,capacity]` BOOL, true where a key is seen."""
        key = None if kind.causal else str(mask.name), kind.window
        if key not in self._made:
            suffix = f"{kind.window or 'all'}" if kind.causal else f"prompt/{mask.name}"
            builder = NodeBuilder(f"/cache/mask/{suffix}")
            queries, keys = self._find_places(builder)
            seen = _causal(builder, queries, keys, kind.window)
            if not kind.causal:
                seen = self._with_prompt(builder, mask, seen)
            self._graph.insert_before(before, builder.nodes)
            self._made[key] = seen
        return self._made[key]

    def _find_places(self, builder: NodeBuilder) -> tuple[ir.Value, ir.Value]:
        """Returns the place of every query `[B,1,S,1]` and of every key `[capacity]`."""
        if self._places is None:
            embeds = next(value for value in self._graph.inputs if value.name == "inputs_embeds")
            new = _new_places(builder, embeds)
            rows = builder.op("rows", "Unsqueeze", [new, builder.ints("last", [-1])], _INT64, (_SEQUENCE, 1))
            filled = builder.op(
                "filled", "Unsqueeze", [self._write, builder.ints("axes", [1, 2, 3])], _INT64, (_BATCH, 1, 1, 1)
            )
            queries = builder.op("queries", "Add", [filled, rows], _INT64, (_BATCH, 1, _SEQUENCE, 1))
            self._places = queries, builder.ints("keys", range(self._capacity))
        return self._places

    def _with_prompt(self, builder: NodeBuilder, mask: ir.Value, causal: ir.Value) -> ir.Value:
        """Takes the canonical graph's mask where the cache is empty."""
        block = mask
        if mask.dtype == _FLOAT:
            masked = builder.constant("masked", _MASKED)
            block = builder.op("block", "Greater", [mask, masked], _BOOL, tuple(mask.shape or ()))
        shape = (_BATCH, 1, _SEQUENCE, self._capacity)
        front = builder.op("front", "Shape", [causal], _INT64, (3,), {"start": 0, "end": 3})
        new = builder.slice("columns", front, 2, 3, 0)
        rest = builder.op("rest", "Sub", [builder.ints("capacity", [self._capacity]), new], _INT64, (1,))
        target = builder.op("target", "Concat", [front, rest], _INT64, (4,), {"axis": 0})
        nothing = builder.op(
            "unseen",
            "Expand",
            [builder.constant("never", np.bool_(False)), target],
            _BOOL,
            (_BATCH, 1, _SEQUENCE, ir.SymbolicDim("rest")),
        )
        square = builder.op("square", "Concat", [front, new], _INT64, (4,), {"axis": 0})
        block = builder.op("expanded", "Expand", [block, square], _BOOL, (_BATCH, 1, _SEQUENCE, _SEQUENCE))
        prompt = builder.op("prompt", "Concat", [block, nothing], _BOOL, shape, {"axis": 3})
        axes = builder.ints("rows_axes", [1, 2, 3])
        filled = builder.op("written", "Unsqueeze", [self._write, axes], _INT64, (_BATCH, 1, 1, 1))
        empty = builder.op("empty", "Equal", [filled, builder.constant("none", np.int64(0))], _BOOL, (_BATCH, 1, 1, 1))
        # ONNX Runtime selects no booleans.
        first = builder.op("first", "And", [empty, prompt], _BOOL, shape)
        further = builder.op("further", "Not", [empty], _BOOL, (_BATCH, 1, 1, 1))
        behind = builder.op("behind", "And", [further, causal], _BOOL, shape)
        return builder.op("seen", "Or", [first, behind], _BOOL, shape)


def _causal(builder: NodeBuilder, queries: ir.Value, keys: ir.Value, window: int | None) -> ir.Value:
    shape = (_BATCH, 1, _SEQUENCE, static_size(keys, 0))
    seen = builder.op("causal", "LessOrEqual", [keys, queries], _BOOL, shape)
    if window is None:
        return seen
    width = builder.constant("width", np.int64(window))
    before = builder.op("before", "Sub", [queries, width], _INT64, (_BATCH, 1, _SEQUENCE, 1))
    within = builder.op("within", "Greater", [keys, before], _BOOL, shape)
    return builder.op("near", "And", [seen, within], _BOOL, shape)


def _new_places(builder: NodeBuilder, embeds: ir.Value) -> ir.Value:
    """Returns 0, 1, 2, ... for every new token `[S]`."""
    length = builder.op("new_size", "Shape", [embeds], _INT64, (1,), {"start": 1, "end": 2})
    stop = builder.op("new_stop", "Squeeze", [length], _INT64, ())
    start, step = builder.constant("new_start", np.int64(0)), builder.constant("new_step", np.int64(1))
    return builder.op("new", "Range", [start, stop, step], _INT64, (_SEQUENCE,))


def _replace_past_shapes(graph: ir.Graph, sites: Sequence[AttentionSite]) -> None:
    """Lets what asks for the cache's shape see that of an empty one, as at a prompt."""
    embeds = next(value for value in graph.inputs if value.name == "inputs_embeds")
    for site in sites:
        for tensor in (site.keys, site.values):
            for shape in [node for node in tensor.past.consumers() if node.op_type == "Shape"]:
                builder = NodeBuilder(f"{shape.name}/empty")
                batch = builder.op("batch", "Shape", [embeds], _INT64, (1,), {"start": 0, "end": 1})
                rest = builder.ints("rest", [site.heads[1], 0, site.head_size])
                whole = builder.op("whole", "Concat", [batch, rest], _INT64, (4,), {"axis": 0})
                start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", 4)
                part = builder.slice("part", whole, start % 4, end if end >= 0 else end + 4, 0)
                graph.insert_before(shape, builder.nodes)
                replace_value(shape.outputs[0], part)


def _cast(builder: NodeBuilder, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return builder.op(name, "Cast", [value], dtype, tuple(value.shape or ()), {"to": int(dtype)})


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise TypeError(f"{value.name} is not computed")
    return node
