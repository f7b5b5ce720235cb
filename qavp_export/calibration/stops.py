"""Where a walk through the decoder stops: the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.passes._linear import input_of


@dataclass(frozen=True)
class Stop:
    """The input that some linear layers share.

    Attributes:
        value: The input as the layers multiply it: quantized and dequantized, if they quantize it.
        nodes: The layers.
    """

    value: ir.Value
    nodes: tuple[ir.Node, ...]


def find_stops(model: ir.Model, nodes: Collection[str]) -> list[Stop]:
    """Groups linear layers by their input, in graph order.

    Args:
        model: The decoder.
        nodes: Names of the layers' MatMul nodes.
    """
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.name in nodes and node.inputs[0] is not None:
            groups.setdefault(node.inputs[0], []).append(node)
    return [Stop(value, tuple(members)) for value, members in groups.items()]


def weight_of(node: ir.Node) -> str:
    """Returns the name of a linear layer's float weight."""
    return str(input_of(node, 1).name)
