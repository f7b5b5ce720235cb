"""Finds the attention of the layer that feeds the vision projector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.errors import GraphError
from qavp_export.passes._builder import Dim
from qavp_export.passes._infra import UnknownShapeError, upstream

_STANDARD = ("", "Attention")
_MULTI_HEAD = ("com.microsoft", "MultiHeadAttention")
_UNREADABLE = frozenset({("com.microsoft", "Attention"), ("com.microsoft", "PackedMultiHeadAttention")})
_PASS_THROUGH = frozenset({"Cast", "Dropout", "Identity"})


@dataclass(frozen=True)
class FusedAttention:
    """An attention operator: its probabilities are recomputed from queries and keys.

    Attributes:
        node: The operator.
        tokens: Tokens T that attend to one another: a number, or a dimension.
        query: `[B,H,T,d]`, or `[B,T,H*d]`.
        key: As the query.
        heads: H.
        head_size: d.
        scale: Factor on the logits.
    """

    node: ir.Node
    tokens: Dim
    query: ir.Value
    key: ir.Value
    heads: int
    head_size: int
    scale: float


@dataclass(frozen=True)
class OpenAttention:
    """An attention written out as MatMul, Softmax, MatMul: its probabilities are in the graph.

    Attributes:
        node: The Softmax.
        tokens: Tokens T that attend to one another: a number, or a dimension.
        probabilities: `[B,H,T,T]`.
    """

    node: ir.Node
    tokens: Dim
    probabilities: ir.Value


def attention_upstream(graph: ir.Graph, features: ir.Value) -> FusedAttention | OpenAttention:
    """Find the last attention that a value depends on.

    Args:
        graph: The graph, topologically sorted.
        features: The value, for example the projector's output.

    Returns:
        The attention of the layer whose output feeds the projector.

    Raises:
        GraphError: There is none, or it is of a kind that cannot be read; `UnknownShapeError` where its sizes
            are not in the graph.
    """
    ancestors = upstream(features)
    for node in reversed(graph):
        if node not in ancestors:
            continue
        kind = (node.domain, node.op_type)
        if kind == _STANDARD:
            return _read_standard(node)
        if kind == _MULTI_HEAD:
            return _read_multi_head(node)
        if kind in _UNREADABLE:
            raise _refused(node, f"operators {kind[0]}.{kind[1]} cannot be read")
        if kind == ("", "Softmax") and (values := _weighted_values(node)) is not None:
            return _read_softmax(node, values)
    raise GraphError(
        f"no attention upstream of {features.name!r}; inline model-local functions if it is inside one, "
        "or use semantic 'norm'"
    )


def _read_standard(node: ir.Node) -> FusedAttention:
    """ONNX Attention, opset 23 or newer."""
    if any(value is not None for value in node.inputs[3:]):
        raise _refused(node, "it has a mask or a key/value cache")
    if node.attributes.get_int("is_causal", 0) != 0:
        raise _refused(node, "it is causal")
    if node.attributes.get_float("softcap", 0.0) != 0.0:
        raise _refused(node, "it caps its logits (softcap)")
    query, key = _input(node, 0), _input(node, 1)
    if _rank(query) == 4:
        heads, key_heads = _size(query, 1, node), _size(key, 1, node)
        return _fused(node, query, key, (heads, key_heads), token_axis=2)
    heads = node.attributes.get_int("q_num_heads", 0)
    key_heads = node.attributes.get_int("kv_num_heads", 0)
    if _rank(query) != 3 or heads < 1:
        raise _refused(node, "its queries are neither [B,H,T,d] nor [B,T,H*d] with q_num_heads")
    return _fused(node, query, key, (heads, key_heads), token_axis=1)


def _read_multi_head(node: ir.Node) -> FusedAttention:
    """ONNX Runtime's MultiHeadAttention with separate queries, keys and values and nothing else."""
    if len(node.inputs) < 3 or any(value is None for value in node.inputs[:3]):
        raise _refused(node, "its queries, keys and values are packed")
    if any(value is not None for value in node.inputs[3:]) or (node.attributes.get_int("unidirectional", 0) != 0):
        raise _refused(node, "it has a bias, a mask or a key/value cache")
    query, key = _input(node, 0), _input(node, 1)
    if _rank(query) != 3 or _rank(key) != 3:
        raise _refused(node, "its queries or keys are not [B,T,H*d]")
    heads = node.attributes.get_int("num_heads", 0)
    return _fused(node, query, key, (heads, heads), token_axis=1)


def _fused(node: ir.Node, query: ir.Value, key: ir.Value, heads: tuple[int, int], *, token_axis: int) -> FusedAttention:
    if heads[0] != heads[1]:
        raise _refused(node, f"it has {heads[0]} query heads and {heads[1]} key heads")
    tokens = _self_attending(node, _known(query, token_axis), _known(key, token_axis))
    if tokens is None:
        reason = f"axis {token_axis} of {query.name!r} is not known; export with a static vision grid"
        raise UnknownShapeError(_message(node, reason))
    channels = _size(query, -1, node)
    head_size = channels // heads[0] if token_axis == 1 else channels
    # ONNX Runtime's operator writes its default scale as 0.
    scale = node.attributes.get_float("scale", 0.0) or head_size**-0.5
    return FusedAttention(node, tokens, query, key, heads[0], head_size, scale)


def _weighted_values(node: ir.Node) -> ir.Value | None:
    """What a Softmax weights: the second operand of the MatMul behind it; None where it is no attention."""
    for consumer in _consumers(node.outputs[0]):
        if consumer.op_type == "MatMul" and consumer.inputs[1] is not None:
            first = consumer.inputs[0]
            if first is not None and node in _passed_from(first):
                return consumer.inputs[1]
    return None


def _consumers(value: ir.Value) -> Iterator[ir.Node]:
    for node in value.consumers():
        if node.op_type in _PASS_THROUGH:
            yield from _consumers(node.outputs[0])
        else:
            yield node


def _passed_from(value: ir.Value) -> set[ir.Node]:
    """The nodes that compute a value, up to the first that does more than pass it through."""
    nodes, node = set(), value.producer()
    while node is not None:
        nodes.add(node)
        source = node.inputs[0] if node.op_type in _PASS_THROUGH else None
        node = source.producer() if source is not None else None
    return nodes


def _read_softmax(node: ir.Node, values: ir.Value) -> OpenAttention:
    """Softmax over the last axis of `[B,H,T,T]`."""
    probabilities = node.outputs[0]
    rank = _rank(probabilities)
    if rank != 4:
        raise _refused(node, f"its probabilities have rank {rank}, expected [B,H,T,T]")
    if node.attributes.get_int("axis", -1) not in (-1, 3):
        raise _refused(node, "its Softmax is not over the last axis")
    keys = _known(probabilities, 3)
    if not isinstance(keys, int):
        keys = _known(values, -2) or keys
    tokens = _self_attending(node, _known(probabilities, 2), keys)
    if tokens is None:
        raise UnknownShapeError(_message(node, "the number of its tokens is not known; export with a static grid"))
    return OpenAttention(node, tokens, probabilities)


def _self_attending(node: ir.Node, queries: Dim | None, keys: Dim | None) -> Dim | None:
    """The number of tokens, of which queries and keys tell; None where one of them is not known."""
    if queries is None or keys is None:
        return None
    # Two names may stand for one dimension, which shows when the graph runs; two numbers do not.
    if isinstance(queries, int) and isinstance(keys, int) and queries != keys:
        raise _refused(node, f"{queries} queries attend to {keys} keys: it is not self-attention")
    return keys if isinstance(keys, int) else queries


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise _refused(node, f"its input {index} is missing")
    return value


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise UnknownShapeError(f"{value.name!r} has no known shape; export with a static vision grid")
    return value.shape.rank()


def _known(value: ir.Value, axis: int) -> Dim | None:
    """The size of an axis: a number, or a dimension that has a name."""
    size = value.shape[axis] if value.shape is not None else None
    return None if isinstance(size, ir.SymbolicDim) and size.value is None else size


def _size(value: ir.Value, axis: int, node: ir.Node) -> int:
    size = _known(value, axis)
    if not isinstance(size, int):
        reason = f"axis {axis} of {value.name!r} is not known; export with a static vision grid"
        raise UnknownShapeError(_message(node, reason))
    return size


def _refused(node: ir.Node, reason: str) -> GraphError:
    return GraphError(_message(node, f"{reason}; use semantic 'norm'"))


def _message(node: ir.Node, reason: str) -> str:
    return f"attention {node.name!r} cannot be scored: {reason}"
