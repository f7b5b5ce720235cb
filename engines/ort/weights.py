"""Weights of lowered graphs: how each comes of the bundle's stored tensors, and what makes it when the engine loads.

A lowered graph holds no weights. Its initializers are named in a plan (`WeightPlan`), and their values are handed to
ONNX Runtime in memory: mapped from the bundle's files as they are, or expanded or repacked from 4-bit codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qavp_export.errors import BundleError

Array = NDArray[Any]

# Elements that are expanded at a time: temporaries stay in a core's cache.
_BLOCK = 1 << 18
_DTYPES: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "FLOAT": np.float32,
        "FLOAT16": np.float16,
        "BFLOAT16": np.uint16,  # its bits
        "INT8": np.int8,
        "UINT8": np.uint8,
        "INT32": np.int32,
        "INT64": np.int64,
        "BOOL": np.bool_,
    }
)
_SIGN_BIT: Mapping[str, np.uint8] = MappingProxyType({"INT4": np.uint8(8), "UINT4": np.uint8(0)})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one of the bundle's files.

    Attributes:
        file: Path inside the bundle, with forward slashes.
        offset: Its first byte.
        length: Its size in bytes.
        dtype: ONNX name of its type; two values of `INT4` and `UINT4` share a byte, the first in the low half.
        shape: Its shape.
    """

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightPlan:
    """One initializer of a lowered graph.

    Attributes:
        name: The initializer.
        form: How it is made; a key of `FORMS`.
        parts: The stored tensors it is made of, by role.
        block: Input channels that share a scale, for forms with scales.
    """

    name: str
    form: str
    parts: Mapping[str, StoredTensor]
    block: int = 0


def read_weights(bundle: Path, plans: Iterable[WeightPlan], threads: int) -> Iterator[tuple[str, Array]]:
    """Makes the initializers of a graph.

    Args:
        bundle: The bundle's folder.
        plans: The initializers.
        threads: How many are made at a time.

    Yields:
        Name and value of each, in order.

    Raises:
        BundleError: A file is missing or shorter than the plan says, or the plan has a form that is not known.
    """
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda plan: (plan.name, _make(bundle, plan)), plans)


def _make(bundle: Path, plan: WeightPlan) -> Array:
    form = FORMS.get(plan.form)
    if form is None:
        raise BundleError(f"weight {plan.name!r} has the unknown form {plan.form!r}; export the bundle again")
    try:
        return form(_Parts(bundle, plan))
    except (OSError, ValueError, LookupError, ArithmeticError) as error:
        raise BundleError(
            f"weight {plan.name!r} cannot be read from {bundle} ({error}); export the bundle again"
        ) from error


class _Parts:
    """The stored tensors of one weight, mapped."""

    def __init__(self, bundle: Path, plan: WeightPlan) -> None:
        self._tensors = plan.parts
        self.block = plan.block
        # All at once, so that a size that is wrong is seen before memory is taken for it.
        self._mapped = {role: _map(bundle, tensor) for role, tensor in plan.parts.items()}

    def __contains__(self, role: str) -> bool:
        return role in self._tensors

    def shape(self, role: str) -> tuple[int, ...]:
        return self._tensors[role].shape

    def array(self, role: str) -> Array:
        """Returns a tensor; 4-bit integers are unpacked to 8 bits."""
        tensor = self._tensors[role]
        if tensor.dtype in _SIGN_BIT:
            return self._unpacked(role, 0, int(np.prod(tensor.shape))).reshape(tensor.shape)
        return self._mapped[role].view(_DTYPES[tensor.dtype]).reshape(tensor.shape)

    def rows(self, role: str, start: int, stop: int) -> Array:
        """Returns rows of an 8-bit matrix, or of a 4-bit one, unpacked."""
        tensor = self._tensors[role]
        if tensor.dtype not in _SIGN_BIT:
            return self.array(role)[start:stop]
        columns = tensor.shape[1]
        return self._unpacked(role, start * columns, stop * columns).reshape(stop - start, columns)

    def floats(self, role: str, start: int, stop: int) -> Array:
        """Returns rows of a float tensor in float32."""
        rows = self.array(role)[start:stop]
        if self._tensors[role].dtype == "BFLOAT16":
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32, copy=False)

    def _unpacked(self, role: str, start: int, stop: int) -> Array:
        """Returns 4-bit integers from one element to another."""
        tensor = self._tensors[role]
        pairs = self._mapped[role][start // 2 : (stop + 1) // 2].astype("<u2")
        pairs = (pairs | pairs << 4) & 0x0F0F
        sign = _SIGN_BIT[tensor.dtype]
        values: Array = ((pairs.view(np.uint8) ^ sign) - sign).view(np.int8)
        return values[start % 2 : start % 2 + stop - start]


def _map(bundle: Path, tensor: StoredTensor) -> Array:
    """Returns a tensor's bytes."""
    bits = 4 if tensor.dtype in _SIGN_BIT else 8 * np.dtype(_DTYPES[tensor.dtype]).itemsize
    if tensor.length != -(-math.prod(tensor.shape) * bits // 8):
        raise ValueError(f"{tensor.length} bytes are no {tensor.dtype} of shape {list(tensor.shape)}")
    return np.memmap(bundle / tensor.file, np.uint8, "r", tensor.offset, (tensor.length,))


def _stored(parts: _Parts) -> Array:
    """Returns a tensor as it is stored."""
    return parts.array("tensor")


def _flat(parts: _Parts) -> Array:
    """Returns a tensor as it is stored, as a vector."""
    return parts.array("tensor").reshape(-1)


def _products(parts: _Parts) -> Array:
    """Returns codes times the multipliers of their groups `[K,N]` int8; codes alone if there are no multipliers."""
    if "multipliers" not in parts:
        return parts.array("codes")
    inputs, outputs = parts.shape("codes")
    products = np.empty((inputs, outputs), np.int8)
    multipliers = parts.array("multipliers")
    step = max(1, _BLOCK // (outputs * parts.block)) * parts.block
    grid = (-1, parts.block, outputs)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        codes = parts.rows("codes", start, stop).reshape(grid)
        of_rows = multipliers[start // parts.block : stop // parts.block, None]
        np.multiply(codes, of_rows, out=products[start:stop].reshape(grid))
    return products


def _unsigned_products(parts: _Parts) -> Array:
    """Returns what `_products` does, plus 128, as uint8."""
    return _flip_sign(_products(parts))


def _packed4(parts: _Parts) -> Array:
    """Returns 4-bit codes as MatMulNBits has them: `[N,K/block,block/2]` uint8 around a zero point of 8."""
    inputs, outputs = parts.shape("codes")
    packed = np.empty((outputs, inputs // 2), np.uint8)
    step = max(2, _BLOCK // outputs // 2 * 2)
    for start in range(0, inputs, step):
        codes = parts.rows("codes", start, min(start + step, inputs)).view(np.uint8)
        pairs = (codes[0::2] & 0x0F) | (codes[1::2] << 4)
        packed[:, start // 2 : start // 2 + len(pairs)] = (pairs ^ 0x88).T
    return packed.reshape(outputs, inputs // parts.block, parts.block // 2)


def _packed8(parts: _Parts) -> Array:
    """Returns 8-bit codes as MatMulNBits has them: `[N,K/block,block]` uint8 around a zero point of 128."""
    inputs, outputs = parts.shape("codes")
    packed = np.empty((outputs, inputs), np.uint8)
    for start, stop in _steps((inputs, outputs)):
        packed[:, start:stop] = _flip_sign(parts.rows("codes", start, stop)).T
    return packed.reshape(outputs, inputs // parts.block, parts.block)


def _block_scales(parts: _Parts) -> Array:
    """Returns the scale of every block of every output channel, `[N * K/block]` float32."""
    if "multipliers" in parts:
        scales = parts.array("multipliers").astype(np.float32) * parts.array("steps").astype(np.float32)
    else:
        scales = parts.array("scales").astype(np.float32)
    return np.ascontiguousarray(scales.T).reshape(-1)


def _widened(parts: _Parts) -> Array:
    """Returns a float tensor in float32."""
    return parts.floats("tensor", 0, parts.shape("tensor")[0])


def _rounded(parts: _Parts) -> Array:
    """Returns a float weight `[K,N]` rounded to 8 bits, one scale for each output channel."""
    scales = _rounded_scales(parts)
    scales[scales == 0] = 1
    codes = np.empty(parts.shape("tensor"), np.int8)
    for start, stop in _steps(codes.shape):
        codes[start:stop] = np.rint(parts.floats("tensor", start, stop) / scales)
    return codes


def _unsigned_rounded(parts: _Parts) -> Array:
    """Returns what `_rounded` does, plus 128, as uint8."""
    return _flip_sign(_rounded(parts))


def _rounded_scales(parts: _Parts) -> Array:
    """Returns the scales of `_rounded`, `[N]` float32."""
    shape = parts.shape("tensor")
    largest = np.zeros(shape[1], np.float32)
    for start, stop in _steps(shape):
        np.maximum(largest, np.abs(parts.floats("tensor", start, stop)).max(axis=0), out=largest)
    return largest / np.float32(127)


def _steps(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows of a matrix."""
    step = max(1, _BLOCK // shape[1])
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _flip_sign(codes: Array) -> Array:
    return codes.view(np.uint8) ^ np.uint8(0x80)


FORMS: Mapping[str, Callable[[_Parts], Array]] = MappingProxyType(
    {
        "stored": _stored,
        "flat": _flat,
        "widened": _widened,
        "products": _products,
        "unsigned_products": _unsigned_products,
        "packed4": _packed4,
        "packed8": _packed8,
        "block_scales": _block_scales,
        "rounded": _rounded,
        "unsigned_rounded": _unsigned_rounded,
        "rounded_scales": _rounded_scales,
    }
)
"""What makes a weight of its parts, by the names that plans use."""
