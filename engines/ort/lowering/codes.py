"""A key/value cache of 8-bit codes: where its scales go, and what tells whether ONNX Runtime reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from qavp_export.engines.lowering.attention import AttentionSite
from qavp_export.engines.ort.lowering.weights import Lowered
from qavp_export.engines.sequences import scale_names
from qavp_export.passes._builder import Dim, NodeBuilder

_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8
_BATCH = ir.SymbolicDim("batch")

# What makes GroupQueryAttention write and read codes. Its scale is 1, since ours differ from sequence to sequence.
CODED: Mapping[str, int | str] = MappingProxyType(
    {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
)

# Capacity and channels of what ONNX Runtime is tried on.
_PROBE = (4, 16)


@dataclass(frozen=True)
class CacheScales:
    """The scales of a layer's codes: each sequence has one for every channel.

    New keys and values are divided by them before they are rounded. What they would multiply in the cache, queries and
    attention's output are multiplied by instead: the same, once a token and not once for each token of the cache.

    Attributes:
        keys: Graph input `[B,1,KV*d]`.
        values: Graph input `[B,1,KV*d]`.
        site: The layer's attention.
    """

    keys: ir.Value
    values: ir.Value
    site: AttentionSite

    @classmethod
    def add(cls, graph: ir.Graph, site: AttentionSite) -> CacheScales:
        """Adds the graph inputs of a layer."""
        shape = ir.Shape([_BATCH, 1, site.heads[1] * site.head_size])
        names = scale_names([str(tensor.past.name) for tensor in (site.keys, site.values)])
        keys, values = (ir.Value(name=name, shape=shape, type=ir.TensorType(_FLOAT)) for name in names)
        graph.inputs.extend([keys, values])
        return cls(keys, values, site)

    def divide(self, builder: NodeBuilder, query: ir.Value, key: ir.Value, value: ir.Value) -> list[ir.Value]:
        """Returns the query, key and value of a single token as attention over codes takes them."""
        shape = tuple(key.shape or ())
        return [
            self._multiply(builder, "query", query, self.keys),
            builder.op("key_codes", "Div", [key, self.keys], _FLOAT, shape),
            builder.op("value_codes", "Div", [value, self.values], _FLOAT, shape),
        ]

    def multiply(self, builder: NodeBuilder, output: ir.Value) -> ir.Value:
        """Returns what attention over values would be of what attention over their codes is."""
        return self._multiply(builder, "output", output, self.values)

    def _multiply(self, builder: NodeBuilder, name: str, rows: ir.Value, scales: ir.Value) -> ir.Value:
        """Multiplies `[B,1,H*d]` by scales, by each in all query heads that share it."""
        heads, shared = self.site.heads
        size = self.site.head_size
        if heads == shared:
            return builder.op(f"coded_{name}_product", "Mul", [rows, scales], _FLOAT, tuple(rows.shape or ()))
        grid: tuple[Dim, ...] = (_BATCH, shared, heads // shared, size)
        split = builder.ints(f"coded_{name}_groups", [0, shared, heads // shared, size])
        each = builder.ints(f"coded_{name}_each", [0, shared, 1, size])
        flat = builder.ints(f"coded_{name}_heads", [0, 1, heads * size])
        rows = builder.op(f"coded_{name}_split", "Reshape", [rows, split], _FLOAT, grid)
        scales = builder.op(f"coded_{name}_scales", "Reshape", [scales, each], _FLOAT, (_BATCH, shared, 1, size))
        scaled = builder.op(f"coded_{name}_product", "Mul", [rows, scales], _FLOAT, grid)
        return builder.op(f"coded_{name}_joined", "Reshape", [scaled, flat], _FLOAT, (_BATCH, 1, heads * size))


def cache_probe() -> Lowered:
    """Returns attention of one token over codes, which a version of ONNX Runtime that does not read them refuses.

    `token [1,1,d]` is query, key and value at once, `past [1,1,capacity,d]` the codes of two keys and values.
    """
    token = ir.Value(name="token", shape=ir.Shape([1, 1, _PROBE[1]]), type=ir.TensorType(_FLOAT))
    past = ir.Value(name="past", shape=ir.Shape([1, 1, *_PROBE]), type=ir.TensorType(_INT8))
    builder = NodeBuilder("/probe")
    filled = [builder.constant("sequences", np.array([2], np.int32)), builder.constant("total", np.int32(3))]
    unit = builder.constant("unit", np.ones(1, np.float32))
    inputs = [token, token, token, past, past, *filled, *[None] * 5, unit, unit]
    attributes = {"num_heads": 1, "kv_num_heads": 1, **CODED}
    node = ir.node("GroupQueryAttention", inputs, attributes, domain="com.microsoft", num_outputs=3, name="attention")
    outputs = {"output": token, "keys": past, "values": past}
    for value, (name, like) in zip(node.outputs, outputs.items(), strict=True):
        value.name, value.type, value.shape = name, like.type, like.shape
    nodes = [*builder.nodes, node]
    versions = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([token, past], node.outputs, nodes=nodes, opset_imports=versions, name="probe")
    return Lowered(ir.Model(graph, ir_version=10), [])
