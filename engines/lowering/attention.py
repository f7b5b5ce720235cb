"""Finds the attention of a canonical decoder's layers, as one operator or written out, with its key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.errors import GraphError
from qavp_export.passes._linear import input_of

# What repeats keys and values for the query heads that share them.
_REPEAT = frozenset({"Reshape", "Expand", "Unsqueeze", "Identity"})
_SWAP_LAST = (0, 1, 3, 2)


@dataclass(frozen=True)
class CachedTensor:
    """Keys or values: what is in the cache and what is new.

    Attributes:
        past: Graph input `[B,KV,past,d]`.
        new: `[B,KV,S,d]`.
        present: Both, a graph output.
    """

    past: ir.Value
    new: ir.Value
    present: ir.Value


@dataclass(frozen=True)
class AttentionSite:
    """Attention of one layer over its cache.

    Attributes:
        output: `[B,H,S,d]`.
        query: `[B,H,S,d]`.
        keys: The keys.
        values: The values.
        mask: `[B,1,S,T]`.
        scale: Factor on the logits.
        softcap: Logits x become `softcap * tanh(x / softcap)`; 0: as they are.
    """

    output: ir.Value
    query: ir.Value
    keys: CachedTensor
    values: CachedTensor
    mask: ir.Value
    scale: float
    softcap: float

    @property
    def heads(self) -> tuple[int, int]:
        """Returns the number of query heads and of key/value heads."""
        return static_size(self.query, 1), static_size(self.keys.past, 1)

    @property
    def head_size(self) -> int:
        """Returns d."""
        return static_size(self.query, 3)


def find_attention(graph: ir.Graph) -> list[AttentionSite]:
    """Finds the attention of every layer of a canonical decoder.

    Raises:
        GraphError: One has a form that is not known here, or a cache has no attention.
    """
    sites = [
        _fused(node) if node.op_type == "Attention" else _written_out(node)
        for node in graph
        if node.op_type in ("Attention", "Softmax")
    ]
    caches = {str(value.name) for value in graph.inputs if str(value.name).startswith("past_key_values.")}
    found = {str(tensor.past.name) for site in sites for tensor in (site.keys, site.values)}
    if caches != found or not sites:
        raise GraphError(f"no attention reads {', '.join(sorted(caches - found)[:2]) or 'a cache'}")
    return sites


def _fused(node: ir.Node) -> AttentionSite:
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        raise GraphError(f"attention {node.name!r} has no mask")
    return AttentionSite(
        output=node.outputs[0],
        query=input_of(node, 0),
        keys=_cached(input_of(node, 1)),
        values=_cached(input_of(node, 2)),
        mask=mask,
        scale=node.attributes.get_float("scale", static_size(input_of(node, 0), 3) ** -0.5),
        softcap=node.attributes.get_float("softcap", 0.0),
    )


def _written_out(node: ir.Node) -> AttentionSite:
    """Reads `MatMul(Softmax(capped(MatMul(query, keys^T)) + mask), values)`."""
    masked, weighting = input_of(node, 0).producer(), _only_consumer(node)
    if masked is None or masked.op_type != "Add" or weighting is None or weighting.op_type != "MatMul":
        raise _unknown(node)
    logits, mask = input_of(masked, 0), input_of(masked, 1)
    # Factors behind the tanh and in front of it.
    behind, capped, value = 1.0, False, logits
    factor = 1.0
    while (producer := value.producer()) is not None and producer.op_type != "MatMul":
        if producer.op_type == "Tanh" and not capped:
            behind, factor, capped = factor, 1.0, True
        elif producer.op_type in ("Mul", "Div"):
            number = _scalar(producer, input_of(producer, 1))
            factor *= number if producer.op_type == "Mul" else 1 / number
        else:
            raise _unknown(node)
        value = input_of(producer, 0)
    if producer is None:
        raise _unknown(node)
    turned = input_of(producer, 1).producer()
    if turned is None or turned.op_type != "Transpose" or tuple(turned.attributes["perm"].as_ints()) != _SWAP_LAST:
        raise _unknown(node)
    return AttentionSite(
        output=weighting.outputs[0],
        query=input_of(producer, 0),
        keys=_cached(input_of(turned, 0)),
        values=_cached(input_of(weighting, 1)),
        mask=mask,
        scale=factor * behind,
        softcap=behind if capped else 0.0,
    )


def _cached(value: ir.Value) -> CachedTensor:
    """Follows keys or values back to where the cache and the new ones are joined."""
    node = value.producer()
    while node is not None and node.op_type in _REPEAT:
        value = input_of(node, 0)
        node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        raise GraphError(f"{value.name!r} does not come from a key/value cache")
    past, new = input_of(node, 0), input_of(node, 1)
    if not past.is_graph_input() or not value.is_graph_output():
        raise GraphError(f"{value.name!r} does not join a key/value cache and what is new")
    return CachedTensor(past, new, value)


def _only_consumer(node: ir.Node) -> ir.Node | None:
    consumers = list(node.outputs[0].consumers())
    return consumers[0] if len(consumers) == 1 else None


def _scalar(node: ir.Node, value: ir.Value) -> float:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1:
        raise _unknown(node)
    return float(tensor.numpy().reshape(-1)[0])


def static_size(value: ir.Value, axis: int) -> int:
    """Returns the size of an axis.

    Raises:
        GraphError: It is not a number.
    """
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise GraphError(f"axis {axis} of {value.name!r} is not a number")
    return size


def _unknown(node: ir.Node) -> GraphError:
    return GraphError(f"{node.name!r} is no attention of a form that is known")
