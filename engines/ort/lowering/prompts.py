"""Attention of prompts whose cache is empty, in tiles of queries: keys behind all of a tile's are not multiplied."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.attention import AttentionSite
from qavp_export.engines.lowering.masks import MaskKind
from qavp_export.engines.ort.lowering.bias import causal_bias
from qavp_export.engines.ort.lowering.heads import (
    by_head,
    by_token,
    producer_of,
    replace_output,
    replace_present,
    scatter,
)
from qavp_export.passes._builder import NodeBuilder

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64
_TOKENS = "sequence"


@dataclass(frozen=True)
class _Tile:
    """Some of a prompt's queries, one after the other.

    Attributes:
        number: Which they are.
        start: Position of the first `[1]`; None: that of the prompt's first token.
        end: Position behind the last `[1]`; None: behind the prompt's last token.
    """

    number: int
    start: ir.Value | None
    end: ir.Value | None

    @property
    def queries(self) -> ir.SymbolicDim:
        """Returns the name of how many queries it has."""
        return ir.SymbolicDim(f"tile_{self.number}")

    @property
    def keys(self) -> ir.SymbolicDim:
        """Returns the name of how many keys these see."""
        return ir.SymbolicDim(_TOKENS if self.end is None else f"{_TOKENS}_{self.number}")


class PromptTiles:
    """Writes the attention of prompts of one graph, where masks are causal and sequences padded on the right.

    ONNX Runtime multiplies every query by every key and drops the half that comes later. Of a tile of queries, all but
    the last such keys are left out. A prompt must have at least as many tokens, with its padding, as there are tiles.

    Args:
        graph: The decoder.
        count: How many tiles a prompt has.
    """

    def __init__(self, graph: ir.Graph, count: int) -> None:
        self._graph = graph
        self._count = count
        # What layers share comes in front of it, in the order in which it is made.
        self._front = graph[0]
        self._tiles: list[_Tile] = []
        self._biases: dict[int | None, list[ir.Value]] = {}

    def write(self, site: AttentionSite, kind: MaskKind) -> None:
        """Puts attention in tiles in the place of a layer's attention."""
        anchor = producer_of(site.output)
        biases = self._biases_of(kind.window)
        builder = NodeBuilder(f"{anchor.name}/tiled")
        tensors = (("query", site.query), ("key", site.keys.new), ("value", site.values.new))
        query, key, value = (by_token(builder, name, tensor) for name, tensor in tensors)
        heads, shared = site.heads
        present = [
            scatter(self._graph, builder, name, tensor, by_head(builder, f"{name}_new", new, shared, site.head_size))
            for name, tensor, new in (("keys", site.keys, key), ("values", site.values, value))
        ]
        attributes: dict[str, int | float] = {"q_num_heads": heads, "kv_num_heads": shared, "scale": site.scale}
        parts = []
        for tile, bias in zip(self._tiles, biases, strict=True):
            queries = _rows(builder, f"query_{tile.number}", query, tile.start, tile.end, tile.queries)
            keys = _rows(builder, f"key_{tile.number}", key, None, tile.end, tile.keys)
            values = _rows(builder, f"value_{tile.number}", value, None, tile.end, tile.keys)
            shape = tuple(queries.shape or ())
            inputs = [queries, keys, values, bias]
            parts.append(builder.op(f"{tile.number}", "Attention", inputs, _FLOAT, shape, attributes))
        result = builder.op("Concat", "Concat", parts, _FLOAT, tuple(query.shape or ()), {"axis": 1})
        self._graph.insert_before(anchor, builder.nodes)
        replace_present(site, present)
        replace_output(site, result)

    def _biases_of(self, window: int | None) -> list[ir.Value]:
        """Returns what is added to each tile's logits `[queries,keys]`."""
        if window not in self._biases:
            builder = NodeBuilder(f"/tiles/window_{window or 'none'}")
            if not self._tiles:
                self._tiles = self._cut(builder)
            self._biases[window] = [self._bias(builder, tile, window) for tile in self._tiles]
            self._graph.insert_before(self._front, builder.nodes)
        return self._biases[window]

    def _cut(self, builder: NodeBuilder) -> list[_Tile]:
        size = self._size(builder)
        numbers = builder.ints("numbers", range(self._count + 1))
        scaled = builder.op("Mul", "Mul", [size, numbers], _INT64, (self._count + 1,))
        count = builder.ints("count", [self._count])
        edges = builder.op("edges", "Div", [scaled, count], _INT64, (self._count + 1,))
        inner = [builder.slice(f"edge_{number}", edges, number, number + 1, 0) for number in range(1, self._count)]
        return [
            _Tile(number, start, end)
            for number, (start, end) in enumerate(zip([None, *inner], [*inner, None], strict=True))
        ]

    def _size(self, builder: NodeBuilder) -> ir.Value:
        """Returns how many tokens a prompt has `[1]`."""
        embeds = next(value for value in self._graph.inputs if value.name == "inputs_embeds")
        return builder.op("size", "Shape", [embeds], _INT64, (1,), {"start": 1, "end": 2})

    def _bias(self, builder: NodeBuilder, tile: _Tile, window: int | None) -> ir.Value:
        part = NodeBuilder(f"/tiles/window_{window or 'none'}/{tile.number}")
        end = self._size(part) if tile.end is None else tile.end
        last = part.op("end", "Squeeze", [end], _INT64, ())
        first = zero = part.constant("zero", np.int64(0))
        if tile.start is not None:
            first = part.op("start", "Squeeze", [tile.start], _INT64, ())
        one = part.constant("one", np.int64(1))
        keys = part.op("keys", "Range", [zero, last, one], _INT64, (tile.keys,))
        queries = part.op("queries", "Range", [first, last, one], _INT64, (tile.queries,))
        queries = part.op("column", "Reshape", [queries, part.ints("shape", [-1, 1])], _INT64, (tile.queries, 1))
        bias = causal_bias(part, keys, queries, window, (tile.queries, tile.keys))
        builder.nodes.extend(part.nodes)
        return bias


def _rows(
    builder: NodeBuilder, name: str, value: ir.Value, start: ir.Value | None, end: ir.Value | None, size: ir.SymbolicDim
) -> ir.Value:
    """Returns some tokens of `[B,S,C]`."""
    if start is None and end is None:
        return value
    batch, _, channels = tuple(value.shape or ())
    first = builder.ints(f"{name}/start", [0]) if start is None else start
    last = builder.ints(f"{name}/end", [np.iinfo(np.int64).max]) if end is None else end
    return builder.op(
        name, "Slice", [value, first, last, builder.ints(f"{name}/axis", [1])], _FLOAT, (batch, size, channels)
    )
