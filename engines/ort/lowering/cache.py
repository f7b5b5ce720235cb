"""Lowers attention over a growing cache to attention over one whose memory is there from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.attention import AttentionSite, CachedTensor, static_size
from qavp_export.engines.lowering.masks import MaskKind
from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.ort.lowering.bias import NEVER, causal_bias
from qavp_export.engines.ort.lowering.capabilities import Capabilities
from qavp_export.engines.ort.lowering.codes import CODED, CacheScales
from qavp_export.engines.ort.lowering.heads import by_token, producer_of, replace_output, replace_present, scatter
from qavp_export.engines.ort.lowering.prompts import PromptTiles
from qavp_export.errors import GraphError
from qavp_export.passes._builder import Dim, NodeBuilder

Phase: TypeAlias = Literal["prefill", "decode", "any"]

SEQLENS = "seqlens_k"
TOTAL = "total_sequence_length"

_FLOAT, _INT8, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64
_BATCH, _CAPACITY = ir.SymbolicDim("batch"), ir.SymbolicDim("capacity")


def lower_attention(
    graph: ir.Graph,
    sites: Sequence[AttentionSite],
    kinds: Mapping[str, MaskKind],
    phase: Phase,
    capabilities: Capabilities,
) -> None:
    """Rewrites attention to write keys and values into the memory that they are read from.

    1. `past_key_values.*` become `[B,KV,capacity,d]`; `present.*` are the same tensors, to be bound to the same memory.
       Sequences are padded on the right. Two new inputs say what is filled: `seqlens_k [B]` INT32, the tokens of each
       sequence less one, and `total_sequence_length` INT32, those of the longest.
    2. Attention becomes `GroupQueryAttention`. A causal mask, with or without a window, becomes the operator's own;
       another is added to the logits of a prompt, and a single text token sees what a causal one would.
    3. For single tokens whose query heads share keys, it is written out instead, each key read once for all its heads.
    4. For prompts alone, where query heads share keys, a causal mask becomes that of tiles; see `PromptTiles`. Without
       sharing they save little, and long prompts take twice the memory.
    5. Where the cache holds 8-bit codes, the graph takes their scales too; see `CacheScales`.

    What is no longer used stays in the graph.

    Args:
        graph: The decoder.
        sites: Its attention.
        kinds: What the masks let through, by name.
        phase: Whether the graph runs prompts (`prefill`), single tokens (`decode`), or both (`any`).
        capabilities: What the provider runs fast.

    Raises:
        GraphError: The graph runs single tokens and prompts, and a mask is not causal; or it runs prompts and the cache
            holds codes.
    """
    if phase != "decode" and capabilities.cache == _INT8:
        raise GraphError("prompts are run before their keys and values have scales; only single tokens read codes")
    if phase == "any" and not all(kind.causal for kind in kinds.values()):
        raise GraphError("a mask of the decoder is not causal")
    lengths = _Lengths.add(graph)
    _replace_past_shapes(graph, sites, lengths)
    writer = _Writer(graph, lengths, capabilities)
    tiles = PromptTiles(graph, capabilities.prompt_tiles)
    for site in sites:
        kind = kinds[str(site.mask.name)]
        for tensor in (site.keys, site.values):
            tensor.past.type = ir.TensorType(capabilities.cache)
            tensor.past.shape = ir.Shape([_BATCH, site.heads[1], _CAPACITY, site.head_size])
        sharing = site.heads[0] > site.heads[1]
        if phase == "decode" and sharing and capabilities.cache == _FLOAT:
            writer.write_out(site, kind)
        elif phase == "prefill" and sharing and capabilities.prompt_tiles and kind.causal and not site.softcap:
            tiles.write(site, kind)
        else:
            writer.group_queries(site, kind, added=not kind.causal and phase == "prefill")


@dataclass(frozen=True)
class _Lengths:
    """What the two new inputs say.

    Attributes:
        sequences: `seqlens_k [B]`.
        total: `total_sequence_length`.
    """

    sequences: ir.Value
    total: ir.Value

    @classmethod
    def add(cls, graph: ir.Graph) -> _Lengths:
        sequences = ir.Value(name=SEQLENS, shape=ir.Shape([_BATCH]), type=ir.TensorType(_INT32))
        total = ir.Value(name=TOTAL, shape=ir.Shape([]), type=ir.TensorType(_INT32))
        graph.inputs.extend([sequences, total])
        return cls(sequences, total)


class _Writer:
    """Writes the attention of one graph."""

    def __init__(self, graph: ir.Graph, lengths: _Lengths, capabilities: Capabilities) -> None:
        self._graph = graph
        self._lengths = lengths
        self._capabilities = capabilities
        # Added to logits, by mask or by window: layers share them.
        self._of_masks: dict[str, ir.Value] = {}
        self._of_windows: dict[int | None, ir.Value] = {}
        self._places: ir.Value | None = None

    def group_queries(self, site: AttentionSite, kind: MaskKind, *, added: bool) -> None:
        """Puts GroupQueryAttention in the place of a layer's attention; `added`: its mask is added to the logits."""
        anchor = producer_of(site.output)
        bias = self._bias_of_mask(site.mask, anchor) if added else None
        builder = NodeBuilder(f"{anchor.name}/cached")
        dtype = self._capabilities.attention
        tensors = (("query", site.query), ("key", site.keys.new), ("value", site.values.new))
        new = [by_token(builder, name, value) for name, value in tensors]
        scales = CacheScales.add(self._graph, site) if self._capabilities.cache == _INT8 else None
        if scales is not None:
            new = scales.divide(builder, *new)
        inputs: list[ir.Value | None] = [
            _cast(builder, f"{name}_cast", value, dtype) for (name, _), value in zip(tensors, new, strict=True)
        ]
        inputs += [site.keys.past, site.values.past, self._lengths.sequences, self._lengths.total]
        heads, shared = site.heads
        attributes: dict[str, int | float | str] = {
            "num_heads": heads,
            "kv_num_heads": shared,
            "scale": site.scale,
            "softcap": site.softcap,
            # The operator's window leaves the query itself out.
            "local_window_size": -1 if added or kind.window is None else kind.window,
        }
        if bias is not None:
            inputs += [None, None, None, _cast(builder, "bias_cast", bias, dtype)]
            # Older versions of ONNX Runtime do not know the attribute, whose default is 1.
            attributes["causal"] = 0
        if scales is not None:
            unit = builder.constant("unit", np.ones(1, np.float32))
            inputs += [None] * 5 + [unit, unit]
            attributes |= CODED
        name = "GroupQueryAttention"
        node = ir.node(name, inputs, attributes, domain="com.microsoft", num_outputs=3, name=f"{anchor.name}/{name}")
        output, *present = node.outputs
        output.name, output.dtype, output.shape = f"{node.name}_output_0", dtype, new[0].shape
        builder.nodes.append(node)
        result = _cast(builder, "output_cast", output, _FLOAT)
        if scales is not None:
            result = scales.multiply(builder, result)
        self._graph.insert_before(anchor, builder.nodes)
        replace_present(site, present)
        replace_output(site, result)

    def write_out(self, site: AttentionSite, kind: MaskKind) -> None:
        """Writes attention of a single token out, with the query heads that share keys as rows of one product."""
        anchor = producer_of(site.output)
        bias = self._bias_of_window(kind.window, anchor)
        builder = NodeBuilder(f"{anchor.name}/cached")
        heads, shared = site.heads
        tensors = (("keys", site.keys), ("values", site.values))
        present = [self._scatter(builder, name, tensor) for name, tensor in tensors]
        rows: tuple[Dim, ...] = (_BATCH, shared, heads // shared, site.head_size)
        query = _one_token(builder, "query", site.query, shared, heads // shared)
        grid = (*rows[:3], _CAPACITY)
        factor = site.scale / (site.softcap or 1.0)
        attributes = {"transB": 1, "alpha": factor}
        name = "FusedMatMul"
        logits = builder.op(name, name, [query, present[0]], _FLOAT, grid, attributes, domain="com.microsoft")
        if site.softcap:
            cap = builder.constant("softcap", np.float32(site.softcap))
            logits = builder.op("Mul", "Mul", [builder.op("Tanh", "Tanh", [logits], _FLOAT, grid), cap], _FLOAT, grid)
        logits = builder.op("Add", "Add", [logits, bias], _FLOAT, grid)
        weights = builder.op("Softmax", "Softmax", [logits], _FLOAT, grid, {"axis": -1})
        output = builder.op("MatMul", "MatMul", [weights, present[1]], _FLOAT, rows)
        flat = builder.ints("flat", [0, 1, heads * site.head_size])
        result = builder.op("output", "Reshape", [output, flat], _FLOAT, (_BATCH, 1, heads * site.head_size))
        self._graph.insert_before(anchor, builder.nodes)
        replace_present(site, present)
        replace_output(site, result)

    def _scatter(self, builder: NodeBuilder, name: str, tensor: CachedTensor) -> ir.Value:
        """Writes what is new behind what is filled."""
        if self._places is None:
            cast = NodeBuilder("/cache")
            self._places = cast.op("places", "Cast", [self._lengths.sequences], _INT64, (_BATCH,), {"to": int(_INT64)})
            self._graph.insert_before(self._graph[0], cast.nodes)
        new = _one_token(builder, f"{name}_new", tensor.new, static_size(tensor.new, 1), 1)
        return scatter(self._graph, builder, name, tensor, new, self._places)

    def _bias_of_mask(self, mask: ir.Value, anchor: ir.Node) -> ir.Value:
        """Returns a mask `[B,1,S,T]` as what is added to logits."""
        if mask.dtype == _FLOAT:
            return mask
        if str(mask.name) not in self._of_masks:
            builder = NodeBuilder(f"{mask.name}/bias")
            seen, never = builder.constant("seen", np.float32(0)), builder.constant("never", NEVER)
            shape = tuple(mask.shape or ())
            self._of_masks[str(mask.name)] = builder.op("Where", "Where", [mask, seen, never], _FLOAT, shape)
            self._graph.insert_before(anchor, builder.nodes)
        return self._of_masks[str(mask.name)]

    def _bias_of_window(self, window: int | None, anchor: ir.Node) -> ir.Value:
        """Returns what is added to a single token's logits `[B,1,1,capacity]`."""
        if window not in self._of_windows:
            builder = NodeBuilder(f"/cache/window_{window or 'none'}")
            shape = (_BATCH, 1, 1, _CAPACITY)
            sizes = builder.op("Shape", "Shape", [_past(self._graph)], _INT64, (1,), {"start": 2, "end": 3})
            size = builder.op("Squeeze", "Squeeze", [sizes], _INT64, ())
            zero, one = builder.constant("zero", np.int64(0)), builder.constant("one", np.int64(1))
            keys = builder.op("keys", "Range", [zero, size, one], _INT64, (_CAPACITY,))
            column = builder.ints("column", [-1, 1, 1, 1])
            last = builder.op("Cast", "Cast", [self._lengths.sequences], _INT64, (_BATCH,), {"to": int(_INT64)})
            last = builder.op("last", "Reshape", [last, column], _INT64, (_BATCH, 1, 1, 1))
            self._of_windows[window] = causal_bias(builder, keys, last, window, shape)
            self._graph.insert_before(anchor, builder.nodes)
        return self._of_windows[window]


def _replace_past_shapes(graph: ir.Graph, sites: Sequence[AttentionSite], lengths: _Lengths) -> None:
    """Lets what asks for the cache's shape see that of what is filled, as in the canonical graph."""
    for site in sites:
        for tensor in (site.keys, site.values):
            past = tensor.past
            for shape in [node for node in past.consumers() if node.op_type == "Shape"]:
                builder = NodeBuilder(f"{shape.name}/filled")
                embeds = next(value for value in graph.inputs if value.name == "inputs_embeds")
                sizes = builder.op("embeds", "Shape", [embeds], _INT64, (3,))
                batch = builder.slice("batch", sizes, 0, 1, 0)
                new = builder.slice("new", sizes, 1, 2, 0)
                total = builder.op("Cast", "Cast", [lengths.total], _INT64, (), {"to": int(_INT64)})
                total = builder.op("total", "Reshape", [total, builder.ints("one", [1])], _INT64, (1,))
                length = builder.op("length", "Sub", [total, new], _INT64, (1,))
                heads = builder.ints("heads", [site.heads[1]])
                channels = builder.ints("channels", [site.head_size])
                whole = builder.op("Concat", "Concat", [batch, heads, length, channels], _INT64, (4,), {"axis": 0})
                start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", 4)
                part = builder.slice("part", whole, start % 4, end if end >= 0 else end + 4, 0)
                graph.insert_before(shape, builder.nodes)
                replace_value(shape.outputs[0], part)


def _one_token(builder: NodeBuilder, name: str, value: ir.Value, heads: int, rows: int) -> ir.Value:
    """Returns `[B,H,1,d]`, heads of a single token, as `[B,heads,rows,d]`."""
    channels = static_size(value, 3)
    target = builder.ints(f"{name}_rows", [0, heads, rows, channels])
    flat = by_token(builder, name, value)
    return builder.op(f"{name}_split", "Reshape", [flat, target], _FLOAT, (_BATCH, heads, rows, channels))


def _cast(builder: NodeBuilder, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    if value.dtype == dtype:
        return value
    return builder.op(name, "Cast", [value], dtype, tuple(value.shape or ()), {"to": int(dtype)})


def _past(graph: ir.Graph) -> ir.Value:
    return next(value for value in graph.inputs if str(value.name).startswith("past_key_values."))
