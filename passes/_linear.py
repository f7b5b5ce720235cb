"""What the passes that quantize linear layers share: `MatMul(x, weight)` with a constant weight `[K,N]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

_T = TypeVar("_T")


def is_linear(node: ir.Node) -> bool:
    """Whether a node is a matrix product with an initializer."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return False
    return node.inputs[1] is not None and node.inputs[1].is_initializer()


def linear_layers(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yields the MatMul and Gemm nodes of the main graph whose weight is an initializer, with the weight."""
    for node in model.graph:
        if is_linear(node):
            yield node, input_of(node, 1)


def why_not_quantizable(node: ir.Node, group_size: int) -> str | None:
    """Returns why a linear layer cannot be quantized in groups, or None."""
    weight = input_of(node, 1)
    if node.op_type == "Gemm":
        return "it is a Gemm; convert it to MatMul + Add first"
    if weight.const_value is None or weight.shape is None or len(weight.shape) != 2:
        return "its weight is not a constant matrix"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype}, not FLOAT"
    if input_of(node, 0).shape is None:
        return "its input has no known shape; run shape inference first"
    channels, _ = matrix_shape(weight)
    if channels % group_size:
        return f"its {channels} input channels are not a multiple of the group size {group_size}"
    return None


class ReadByAll(Generic[_T]):
    """Computes a value for a number of readers, and forgets it when the last one has read it."""

    def __init__(self, compute: Callable[[], _T], readers: int) -> None:
        self._compute = compute
        self._readers = readers
        self._left = 0
        self._value: _T | None = None

    def read(self) -> _T:
        """Returns the value; computes it for the first reader."""
        value = self._value
        if value is None:
            value, self._left = self._compute(), self._readers
        self._left -= 1
        self._value = value if self._left else None
        return value


def by_output_channel(weight: ir.Value) -> npt.NDArray[np.float32]:
    """Reads a weight `[K,N]` as a contiguous `[N,K]`."""
    if weight.const_value is None:
        raise TypeError(f"initializer {weight.name} has no tensor")
    return np.ascontiguousarray(weight.const_value.numpy().T)


def weight_part(
    weight: ir.Value,
    part: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    read: Callable[[], npt.NDArray[np.generic]],
) -> ir.Value:
    """Returns a lazy initializer `<weight>.<part>`; `codes` take over the weight's metadata."""
    name = f"{weight.name}.{part}"
    lazy = ir.LazyTensor(lambda: part_tensor(name, dtype, read()), dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(
        name=name,
        shape=lazy.shape,
        type=ir.TensorType(dtype),
        const_value=lazy,
        # The codes stand for the weight; steps and scales are new numbers.
        metadata_props=dict(weight.metadata_props) if part == "codes" else {},
    )


def part_tensor(name: str, dtype: ir.DataType, values: npt.NDArray[np.generic]) -> ir.TensorProtocol:
    """Returns values as a tensor; 4-bit integers come as bytes and are packed."""
    array = np.ascontiguousarray(values)
    if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        packed = _pack_pairs(array.reshape(-1).view(np.uint8))
        return ir.PackedTensor(packed, dtype, shape=ir.Shape(values.shape), name=name)
    return ir.Tensor(array.astype(dtype.numpy(), copy=False).reshape(values.shape), dtype=dtype, name=name)


def _pack_pairs(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Packs two 4-bit codes into a byte, the first in the low half, in one vectorised step over 16-bit words."""
    if codes.size % 2:
        codes = np.append(codes, np.uint8(0))
    pairs = codes.view("<u2")
    return ((pairs & np.uint16(0x0F)) | ((pairs >> np.uint16(4)) & np.uint16(0xF0))).astype(np.uint8)


def name_of(node: ir.Node) -> str:
    """Returns a node's name; that of its first output for a node without one."""
    return node.name or str(node.outputs[0].name)


def graph_of(node: ir.Node) -> ir.Graph:
    """Returns the graph that holds a node."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node {node.name} is not in a graph")
    return graph


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Returns an input that must be there."""
    value = node.inputs[index]
    if value is None:
        raise TypeError(f"node {node.name} lacks input {index}")
    return value


def matrix_shape(weight: ir.Value) -> tuple[int, int]:
    """Returns the static shape `(K, N)` of a weight."""
    if weight.shape is None:
        raise TypeError(f"initializer {weight.name} has no shape")
    rows, columns = weight.shape.numpy()
    return rows, columns
