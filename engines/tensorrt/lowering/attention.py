"""Lowers attention over a growing cache to attention in 16-bit floats over one that has its memory from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.attention import AttentionSite, CachedTensor, static_size
from qavp_export.engines.lowering.masks import MaskKind
from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.tensorrt.lowering.capabilities import ATTENTION, CACHE_UPDATE, Capabilities
from qavp_export.engines.tensorrt.lowering.operators import Attending, attend, cast
from qavp_export.passes._builder import NodeBuilder

WRITE_INDICES = "write_indices"
ATTENTION_MASK = "attention_mask"
# The first opset with TensorScatter.
SCATTER_OPSET = 24

_FLOAT, _HALF, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.BOOL
_BATCH, _SEQUENCE = ir.SymbolicDim("batch"), ir.SymbolicDim("sequence")
# A masked logit is below this.
_MASKED = np.float32(np.finfo(np.float32).min / 2)


def lower_attention(
    graph: ir.Graph,
    sites: Sequence[AttentionSite],
    kinds: Mapping[str, MaskKind],
    capacity: int,
    capabilities: Capabilities,
) -> list[str]:
    """Rewrites attention to write keys and values into memory of a fixed size.

    1. `past_key_values.*` become `[B,KV,capacity,d]` FLOAT16; `present.*` are the same memory behind TensorScatter,
       which TensorRT builds as its key/value cache update. Releases without one get ScatterND: there `present.*` is
       other memory, which holds the past too. A new input `write_indices [B]` INT64 says how many tokens of each
       sequence the cache holds; sequences are padded on the right.
    2. Attention runs in FLOAT16 on the cache as it is, grouped heads and all. It is written out where its logits are
       capped, which TensorRT's operator does not do, and for releases without the operator.
    3. A mask that is causal, with or without a window, is computed from places in the cache. Another is that of the
       canonical graph for a prompt in an empty cache, where the input `attention_mask [B,S]` says what is padding, and
       causal behind it.

    What is no longer used stays in the graph.

    Args:
        graph: The decoder.
        sites: Its attention.
        kinds: What the masks let through, by name.
        capacity: Tokens that the cache has memory for; TensorRT takes no other than a fixed number.
        capabilities: What the network may hold.

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
    places = _Places(graph, write, _producer(sites[0].output), capacity)
    masks = _Masks(graph, places)
    nodes = []
    for site in sites:
        mask = masks.of(site.mask, kinds[str(site.mask.name)], _producer(site.output))
        nodes.append(_lower_site(graph, site, places, mask, capabilities))
    if CACHE_UPDATE in capabilities.operators:
        graph.opset_imports[""] = max(graph.opset_imports[""], SCATTER_OPSET)
    return nodes


def _lower_site(
    graph: ir.Graph, site: AttentionSite, places: _Places, mask: ir.Value, capabilities: Capabilities
) -> str:
    anchor = _producer(site.output)
    builder = NodeBuilder(f"{anchor.name}/cached")
    updates = CACHE_UPDATE in capabilities.operators
    keys, values = (
        places.update(builder, name, tensor) if updates else places.scatter(builder, name, tensor)
        for name, tensor in (("keys", site.keys), ("values", site.values))
    )
    is_written_out = bool(site.softcap) or ATTENTION not in capabilities.operators
    if is_written_out:
        attended = attend(builder, Attending(site.query, keys, values, mask, site.scale, site.softcap), _HALF)
    else:
        inputs, shape = [cast(builder, "query", site.query, _HALF), keys, values, mask], tuple(site.query.shape or ())
        attended = builder.op("Attention", "Attention", inputs, _HALF, shape, {"scale": site.scale})
    result = cast(builder, "output", attended, _FLOAT)
    graph.insert_before(anchor, builder.nodes)
    for tensor, present in ((site.keys, keys), (site.values, values)):
        replace_value(tensor.present, present)
    replace_value(site.output, result)
    return f"{anchor.name}/cached/{'MatMul' if is_written_out else 'Attention'}"


class _Places:
    """Where new tokens go in the cache.

    Attributes:
        write: Tokens of each sequence in the cache `[B]`.
        queries: The place of every new token `[B,1,S,1]`.
        keys: 0, 1, 2, ... `[capacity]`.
        capacity: Tokens that the cache has memory for.
    """

    def __init__(self, graph: ir.Graph, write: ir.Value, before: ir.Node, capacity: int) -> None:
        """Computes them in front of a node."""
        self.write = write
        self.capacity = capacity
        self._graph = graph
        self._before = before
        self._embeds = next(value for value in graph.inputs if value.name == "inputs_embeds")
        self._indices: dict[int, ir.Value] = {}
        builder = NodeBuilder("/cache/places")
        new = _count(builder, "new", self._embeds, 1)
        rows = builder.op("rows", "Unsqueeze", [new, builder.ints("last", [-1])], _INT64, (_SEQUENCE, 1))
        filled = builder.op("filled", "Unsqueeze", [write, builder.ints("axes", [1, 2, 3])], _INT64, (_BATCH, 1, 1, 1))
        self.queries = builder.op("queries", "Add", [filled, rows], _INT64, (_BATCH, 1, _SEQUENCE, 1))
        self.keys = builder.ints("keys", range(capacity))
        graph.insert_before(before, builder.nodes)

    def update(self, builder: NodeBuilder, name: str, tensor: CachedTensor) -> ir.Value:
        """Writes what is new behind what is there."""
        new = cast(builder, f"{name}_new", tensor.new, _HALF)
        inputs = [tensor.past, new, self.write]
        return builder.op(name, "TensorScatter", inputs, _HALF, tuple(tensor.past.shape or ()), {"axis": 2})

    def scatter(self, builder: NodeBuilder, name: str, tensor: CachedTensor) -> ir.Value:
        """Copies what is there and writes what is new behind it."""
        new = cast(builder, f"{name}_new", tensor.new, _HALF)
        inputs = [tensor.past, self._of_heads(static_size(tensor.past, 1)), new]
        return builder.op(name, "ScatterND", inputs, _HALF, tuple(tensor.past.shape or ()))

    def _of_heads(self, heads: int) -> ir.Value:
        """Returns sequence, head and place of every new key `[B,KV,S,3]`; layers share it."""
        if heads not in self._indices:
            builder = NodeBuilder(f"/cache/places/{heads}_heads")
            sequences = _count(builder, "sequences", self._embeds, 0)
            column = builder.op(
                "column", "Unsqueeze", [sequences, builder.ints("axes", [1, 2, 3])], _INT64, (_BATCH, 1, 1, 1)
            )
            number = builder.constant("heads", np.arange(heads, dtype=np.int64).reshape(1, heads, 1, 1))
            front = builder.op("front", "Shape", [self._embeds], _INT64, (2,), {"start": 0, "end": 2})
            batch, length = builder.slice("batch", front, 0, 1, 0), builder.slice("length", front, 1, 2, 0)
            parts = [batch, builder.ints("heads_size", [heads]), length, builder.ints("one", [1])]
            target = builder.op("target", "Concat", parts, _INT64, (4,), {"axis": 0})
            grid = (_BATCH, heads, _SEQUENCE, 1)
            columns = [
                builder.op(f"expanded_{index}", "Expand", [value, target], _INT64, grid)
                for index, value in enumerate((column, number, self.queries))
            ]
            whole = builder.op("indices", "Concat", columns, _INT64, (*grid[:3], 3), {"axis": 3})
            self._graph.insert_before(self._before, builder.nodes)
            self._indices[heads] = whole
        return self._indices[heads]


class _Masks:
    """Computes what queries see in the cache; layers share it."""

    def __init__(self, graph: ir.Graph, places: _Places) -> None:
        self._graph = graph
        self._places = places
        self._made: dict[tuple[str | None, int | None], ir.Value] = {}

    def of(self, mask: ir.Value, kind: MaskKind, before: ir.Node) -> ir.Value:
        """Returns `[B,1,S,capacity]` BOOL, true where a key is seen."""
        key = None if kind.causal else str(mask.name), kind.window
        if key not in self._made:
            suffix = f"{kind.window or 'all'}" if kind.causal else f"prompt/{mask.name}"
            builder = NodeBuilder(f"/cache/mask/{suffix}")
            seen = _causal(builder, self._places.queries, self._places.keys, kind.window)
            if not kind.causal:
                seen = self._with_prompt(builder, mask, seen)
            self._graph.insert_before(before, builder.nodes)
            self._made[key] = seen
        return self._made[key]

    def _with_prompt(self, builder: NodeBuilder, mask: ir.Value, causal: ir.Value) -> ir.Value:
        """Takes the canonical graph's mask where the cache is empty."""
        block = mask
        if mask.dtype == _FLOAT:
            masked = builder.constant("masked", _MASKED)
            block = builder.op("block", "Greater", [mask, masked], _BOOL, tuple(mask.shape or ()))
        shape = (_BATCH, 1, _SEQUENCE, self._places.capacity)
        front = builder.op("front", "Shape", [causal], _INT64, (3,), {"start": 0, "end": 3})
        new = builder.slice("columns", front, 2, 3, 0)
        rest = builder.op("rest", "Sub", [builder.ints("capacity", [self._places.capacity]), new], _INT64, (1,))
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
        filled = builder.op("written", "Unsqueeze", [self._places.write, axes], _INT64, (_BATCH, 1, 1, 1))
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


def _count(builder: NodeBuilder, name: str, value: ir.Value, axis: int) -> ir.Value:
    """Returns 0, 1, 2, ... for all along an axis of a value."""
    length = builder.op(f"{name}_size", "Shape", [value], _INT64, (1,), {"start": axis, "end": axis + 1})
    stop = builder.op(f"{name}_stop", "Squeeze", [length], _INT64, ())
    start, step = builder.constant(f"{name}_start", np.int64(0)), builder.constant(f"{name}_step", np.int64(1))
    size = (value.shape or ir.Shape([_BATCH, _SEQUENCE]))[axis]
    return builder.op(name, "Range", [start, stop, step], _INT64, (size,))


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


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise TypeError(f"{value.name} is not computed")
    return node
