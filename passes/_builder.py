"""Builds a named, typed run of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Dim: TypeAlias = int | ir.SymbolicDim
Attribute: TypeAlias = int | float | str | Sequence[int]


class NodeBuilder:
    """Collects nodes whose names start with one prefix; every output has a type and a shape.

    Args:
        prefix: For example `/prune/select`: the node `TopK` is then named `/prune/select/TopK`.

    Attributes:
        nodes: What was built so far, in topological order.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[ir.Node] = []

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        shape: Sequence[Dim],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        used: int = 0,
    ) -> ir.Value:
        """Add a node.

        Args:
            name: The node's name behind the prefix.
            op_type: The operator.
            inputs: Its inputs.
            dtype: The type of the output that is used.
            shape: Its shape.
            attributes: The operator's attributes.
            domain: The operator's domain.
            outputs: How many outputs the node has.
            used: Which output is used; the others stay without type.

        Returns:
            The output that is used.
        """
        node = ir.node(
            op_type,
            inputs,
            attributes,
            domain=domain,
            num_outputs=outputs,
            name=f"{self._prefix}/{name}",
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{index}"
        self.nodes.append(node)
        output = node.outputs[used]
        output.dtype, output.shape = dtype, ir.Shape(shape)
        return output

    def constant(self, name: str, array: npt.NDArray[Any] | np.generic) -> ir.Value:
        """Add a Constant node that holds an array."""
        node = ir.node("Constant", [], {"value": ir.tensor(array)}, num_outputs=1, name=f"{self._prefix}/{name}")
        output = node.outputs[0]
        output.name = f"{node.name}_output_0"
        output.dtype, output.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self.nodes.append(node)
        return output

    def ints(self, name: str, values: Sequence[int]) -> ir.Value:
        """Add a Constant node that holds int64 numbers, rank 1."""
        return self.constant(name, np.asarray(values, dtype=np.int64))

    def slice(self, name: str, value: ir.Value, start: int, stop: Dim, axis: int) -> ir.Value:
        """Add a Slice along one axis; a slice that takes everything adds nothing.

        Raises:
            TypeError: It takes part of an axis whose size is not a number.
        """
        shape = list(_shape(value))
        if start == 0 and shape[axis] == stop:
            return value
        if not isinstance(stop, int):
            raise TypeError(f"{name} would slice {value.name} up to {stop}, which is not a number")
        shape[axis] = stop - start
        bounds = [
            self.ints(f"{name}/{part}", [number]) for part, number in (("start", start), ("stop", stop), ("axis", axis))
        ]
        return self.op(name, "Slice", [value, *bounds], _dtype(value), shape)

    def to_float(self, name: str, value: ir.Value) -> ir.Value:
        """Add a Cast to FLOAT where the value is not FLOAT."""
        if value.dtype == ir.DataType.FLOAT:
            return value
        attributes = {"to": int(ir.DataType.FLOAT)}
        return self.op(name, "Cast", [value], ir.DataType.FLOAT, _shape(value), attributes)


def _shape(value: ir.Value) -> tuple[Dim, ...]:
    if value.shape is None:
        raise TypeError(f"{value.name} has no shape")
    return tuple(value.shape)


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise TypeError(f"{value.name} has no type")
    return value.dtype
