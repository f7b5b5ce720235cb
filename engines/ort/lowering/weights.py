"""Collects what a lowered graph's weights are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType

import onnx_ir as ir

from qavp_export.engines.ort.weights import StoredTensor, WeightPlan
from qavp_export.errors import GraphError

# Of initializers whose values are handed over in memory; no such file exists.
_LOCATION = "in-memory"
# What 4-bit integers are unpacked to.
_UNPACKED: Mapping[ir.DataType, ir.DataType] = MappingProxyType(
    {ir.DataType.INT4: ir.DataType.INT8, ir.DataType.UINT4: ir.DataType.INT8}
)


@dataclass(frozen=True)
class Lowered:
    """A lowered graph.

    Attributes:
        model: The graph.
        weights: What its initializers are made of.
        precision: What its quantized linear layers run in, by the name of the canonical node.
    """

    model: ir.Model
    weights: list[WeightPlan]
    precision: Mapping[str, str] = field(default_factory=dict)


class WeightPlans:
    """Names a graph's initializers and plans how they are made.

    Args:
        component: The folder of the canonical graph inside the bundle.
    """

    def __init__(self, component: str) -> None:
        self._component = component
        self._plans: dict[str, WeightPlan] = {}

    def add(
        self,
        graph: ir.Graph,
        name: str,
        form: str,
        parts: Mapping[str, ir.Value],
        dtype: ir.DataType,
        shape: Sequence[int],
        block: int = 0,
    ) -> ir.Value:
        """Adds an initializer without data to a graph; one that is there already is returned.

        Args:
            graph: The lowered graph.
            name: The initializer's name.
            form: How it is made; see `engines.ort.weights`.
            parts: Initializers of the canonical graph by role.
            dtype: Type of the initializer.
            shape: Its shape.
            block: Input channels that share a scale.

        Raises:
            GraphError: A part does not lie in the bundle's files.
        """
        if name in graph.initializers:
            return graph.initializers[name]
        stored = {role: self._stored(part) for role, part in parts.items()}
        self._plans[name] = WeightPlan(name, form, stored, block)
        tensor = ir.ExternalTensor(_LOCATION, 0, 0, dtype, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def finish(self, graph: ir.Graph) -> list[WeightPlan]:
        """Plans the initializers that are still the canonical graph's own, and returns all that the graph reads."""
        for value in list(graph.initializers.values()):
            if str(value.name) not in self._plans and isinstance(value.const_value, ir.ExternalTensor):
                tensor = value.const_value
                plan = WeightPlan(str(value.name), "stored", {"tensor": self._stored(value)})
                self._plans[plan.name] = plan
                dtype = _UNPACKED.get(tensor.dtype, tensor.dtype)
                value.const_value = ir.ExternalTensor(_LOCATION, 0, 0, dtype, shape=tensor.shape, name=plan.name)
                # A new type: clones share the one that is there.
                value.type = ir.TensorType(dtype)
        return [self._plans[name] for name in graph.initializers if name in self._plans]

    def _stored(self, value: ir.Value) -> StoredTensor:
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.offset is None or tensor.length is None:
            raise GraphError(f"initializer {value.name!r} does not lie in the bundle's weight files")
        file = PurePosixPath(self._component) / str(tensor.location)
        shape = tuple(int(size) for size in tensor.shape.numpy())
        return StoredTensor(str(file), tensor.offset, tensor.length, tensor.dtype.name, shape)
