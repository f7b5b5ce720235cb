"""Follows attention values from the linear layer that makes them to the one that reads the attention's output."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.passes._linear import input_of, is_linear, matrix_shape
from qavp_export.passes._residual import bias_of, only_reader

_VALUE = 2
_PERM = [0, 2, 1, 3]


@dataclass(frozen=True)
class ValuePath:
    """The way of one layer's values through its attention.

    Attributes:
        maker: The linear layer that makes the values (v_proj).
        bias: Its bias, an initializer; None if there is none.
        reader: The linear layer that reads the attention's output (o_proj).
        value_heads: Heads of the values.
        heads: Heads of the output.
        head_dim: Channels of each head.
    """

    maker: ir.Node
    bias: ir.Value | None
    reader: ir.Node
    value_heads: int
    heads: int
    head_dim: int


def find_value_path(attention: ir.Node) -> ValuePath | str:
    """Returns the values' way through an Attention node with heads split, or why it cannot be followed."""
    value, output = input_of(attention, _VALUE), attention.outputs[0]
    head_dim = _last(value)
    if value.shape is None or len(value.shape) != 4 or head_dim is None:
        return "its values have no static [B,H,S,d] shape"
    split = _split_heads(value, head_dim)
    if split is None:
        return "its values take a way that is not known"
    product, bias = bias_of(split)
    maker = product.producer() if product is not None else None
    if maker is None or not _is_own(maker) or not (split is product or only_reader(split)):
        return "its values come from no linear layer of their own"
    reader = _reader(output, head_dim)
    if reader is None:
        return "its output leads to no linear layer of its own"
    made, read = matrix_shape(input_of(maker, 1))[1], matrix_shape(input_of(reader, 1))[0]
    if made % head_dim or read % head_dim:
        return "its heads do not fill the linear layers"
    return ValuePath(maker, bias, reader, made // head_dim, read // head_dim, head_dim)


def _split_heads(value: ir.Value, head_dim: int) -> ir.Value | None:
    """Walks up through what leaves the last axis alone; returns what is reshaped into heads."""
    while True:
        node = value.producer()
        users = [user for user, _ in value.uses() if user.op_type not in ("Shape", "Size")]
        if node is None or len(users) != 1:
            return None
        source = _same_channels(node, head_dim)
        if source is None:
            inner = node.inputs[0]
            is_split = node.op_type == "Reshape" and inner is not None and _heads_are_last(inner, value, head_dim)
            return inner if is_split and inner is not None and only_reader(inner) else None
        value = source


def _same_channels(node: ir.Node, head_dim: int) -> ir.Value | None:
    """Returns the input that a node passes on with its last axis, of `head_dim` channels, untouched."""
    source = node.inputs[0]
    if node.op_type == "Concat" and node.attributes.get_int("axis", -1) in (-2, 2) and len(node.inputs) == 2:
        # The cache comes in as rotated as it went out.
        source = node.inputs[1] if source is not None and source.is_graph_input() else None
    elif node.op_type == "Transpose":
        source = source if list(node.attributes.get_ints("perm", [])) == _PERM else None
    elif node.op_type not in ("Expand", "Reshape", "Unsqueeze"):
        return None
    if source is None or source.shape is None or len(source.shape) < 4:
        return None
    return source if _last(source) == head_dim == _last(node.outputs[0]) else None


def _heads_are_last(flat: ir.Value, split: ir.Value, head_dim: int) -> bool:
    if flat.shape is None or split.shape is None or len(flat.shape) != 3 or len(split.shape) != 4:
        return False
    heads, width = split.shape[2], flat.shape[2]
    return isinstance(heads, int) and isinstance(width, int) and heads * head_dim == width


def _reader(output: ir.Value, head_dim: int) -> ir.Node | None:
    """Walks down from `[B,H,S,d]` through the merging of heads to a linear layer."""
    turned = _only_user(output, "Transpose")
    if turned is None or list(turned.attributes.get_ints("perm", [])) != _PERM:
        return None
    merged = _only_user(turned.outputs[0], "Reshape")
    if merged is None or not _heads_are_last(merged.outputs[0], turned.outputs[0], head_dim):
        return None
    reader = _only_user(merged.outputs[0], "MatMul")
    return reader if reader is not None and _is_own(reader) else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [user for user, _ in value.uses() if user.op_type != "Shape"]
    if len(users) != 1 or users[0].op_type != op_type or value.is_graph_output():
        return None
    return users[0]


def _is_own(node: ir.Node) -> bool:
    """Whether a node is a linear layer whose weight is no other node's."""
    return node.op_type == "MatMul" and is_linear(node) and len(input_of(node, 1).uses()) == 1


def _last(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None
