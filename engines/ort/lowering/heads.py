"""Heads by token and by head, and what attention leaves behind when it is replaced."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qavp_export.engines.lowering.attention import AttentionSite, CachedTensor, static_size
from qavp_export.engines.lowering.values import replace_value
from qavp_export.errors import GraphError
from qavp_export.passes._builder import NodeBuilder
from qavp_export.passes._linear import input_of

_FLOAT = ir.DataType.FLOAT
_SWAP_HEADS = (0, 2, 1, 3)
# The first opset with TensorScatter.
_SCATTER_OPSET = 24


def by_token(builder: NodeBuilder, name: str, value: ir.Value) -> ir.Value:
    """Returns `[B,H,S,d]` as `[B,S,H*d]`; where it was made of that, what it was made of."""
    node, shape = value.producer(), tuple(value.shape or ())
    heads, channels = static_size(value, 1), static_size(value, 3)
    flat = (shape[0], shape[2], heads * channels)
    if node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
        inputs = [by_token(builder, f"{name}_unrotated", input_of(node, 0)), input_of(node, 1), input_of(node, 2)]
        attributes = {key: node.attributes.get_int(key, 0) for key in ("interleaved", "rotary_embedding_dim")}
        return builder.op(
            f"{name}_rotated", "RotaryEmbedding", inputs, _FLOAT, flat, {**attributes, "num_heads": heads}
        )
    target = builder.ints(f"{name}_flat", [0, 0, heads * channels])
    if node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _SWAP_HEADS:
        joined = input_of(node, 0)
        split = joined.producer()
        source = input_of(split, 0) if split is not None and split.op_type == "Reshape" else None
        if source is not None and source.shape is not None and len(source.shape) == 3:
            return source
        return builder.op(f"{name}_joined", "Reshape", [joined, target], _FLOAT, flat)
    turned = (shape[0], shape[2], heads, channels)
    joined = builder.op(f"{name}_turned", "Transpose", [value], _FLOAT, turned, {"perm": _SWAP_HEADS})
    return builder.op(f"{name}_joined", "Reshape", [joined, target], _FLOAT, flat)


def by_head(builder: NodeBuilder, name: str, value: ir.Value, heads: int, channels: int) -> ir.Value:
    """Returns `[B,S,H*d]` as `[B,H,S,d]`."""
    batch, tokens = tuple(value.shape or ())[:2]
    target = builder.ints(f"{name}_heads", [0, 0, heads, channels])
    split = builder.op(f"{name}_split", "Reshape", [value, target], _FLOAT, (batch, tokens, heads, channels))
    shape = (batch, heads, tokens, channels)
    return builder.op(f"{name}_by_head", "Transpose", [split], _FLOAT, shape, {"perm": _SWAP_HEADS})


def scatter(
    graph: ir.Graph,
    builder: NodeBuilder,
    name: str,
    tensor: CachedTensor,
    new: ir.Value,
    places: ir.Value | None = None,
) -> ir.Value:
    """Writes keys or values `[B,KV,S,d]` into the cache from `places [B]` on; None: from its front."""
    graph.opset_imports[""] = max(graph.opset_imports[""], _SCATTER_OPSET)
    inputs = [tensor.past, new] if places is None else [tensor.past, new, places]
    return builder.op(name, "TensorScatter", inputs, _FLOAT, tuple(tensor.past.shape or ()), {"axis": 2})


def replace_output(site: AttentionSite, result: ir.Value) -> None:
    """Puts `[B,S,H*d]` in the place of what the decoder makes of attention's `[B,H,S,d]`."""
    for turned in [node for node in site.output.consumers() if node.op_type == "Transpose"]:
        for joined in [node for node in turned.outputs[0].consumers() if node.op_type == "Reshape"]:
            shape = joined.outputs[0].shape
            if shape is not None and len(shape) == 3:
                replace_value(joined.outputs[0], result)
    left = [node for node in site.output.consumers() if node.op_type != "Transpose" or _is_read(node)]
    if left:
        raise GraphError(f"{site.output.name!r} is read by {left[0].name!r}, which does not join its heads")


def _is_read(node: ir.Node) -> bool:
    """Whether anything that counts reads a node's output."""
    return any(reader.op_type != "Reshape" or reader.outputs[0].uses() for reader in node.outputs[0].consumers())


def replace_present(site: AttentionSite, present: Sequence[ir.Value]) -> None:
    """Puts keys and values `[B,KV,capacity,d]` in the place of the graph's outputs."""
    for tensor, value in zip((site.keys, site.values), present, strict=True):
        value.shape, value.type = tensor.past.shape, tensor.past.type
        replace_value(tensor.present, value)


def producer_of(value: ir.Value) -> ir.Node:
    """Returns the node that computes a value.

    Raises:
        TypeError: None does.
    """
    node = value.producer()
    if node is None:
        raise TypeError(f"{value.name} is not computed")
    return node
