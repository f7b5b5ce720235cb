"""A graph's external data: every tensor has its place from the start, and is written there once, in any order."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

# Tensors start at multiples of this, so that a mapped one is aligned for any vector instruction.
_ALIGNMENT = 64
# Constants up to this size stay in the graph, where shape inference finds them; weights never do.
_INLINE_BYTES = 256
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: file name, offset and length in bytes."""

    file: str
    offset: int
    length: int


class WeightFile:
    """Writes a graph whose tensors lie beside it.

    The data are `<graph>.data`, and `<graph>.data.1` and so on where the file system holds no file as large.

    Args:
        graph: Path of the graph; its folder exists.
        model: The graph. Its initializers have shapes and dtypes; they may be lazy. Each is replaced by a reference to
            the file once it is written.
        written: Checksums of the tensors that were written, by initializer name; filled as the work goes on. What it
            names at the start and the file holds is not written again.
        file_limit: Most bytes of one file; None asks the file system.
    """

    def __init__(
        self, graph: Path, model: ir.Model, written: MutableMapping[str, Any], file_limit: int | None = None
    ) -> None:
        self._graph = graph
        self._model = model
        self._written = written
        self._places = _places(model, f"{graph.name}.data", file_limit or _largest_file(graph.parent))
        self._done: set[str] = set()
        for file in {place.file: None for place in self._places.values()}:
            with (graph.parent / file).open("ab") as data:
                data.truncate(max(p.offset + p.length for p in self._places.values() if p.file == file))
        for name, place in self._places.items():
            if name in written and written[name] == self._checksum(place):
                self._refer(name)

    def holds(self, name: str) -> bool:
        """Whether an initializer has been written."""
        return name in self._done

    def write(self, name: str, tensor: ir.TensorProtocol) -> None:
        """Writes the tensor of one initializer.

        Args:
            name: The initializer.
            tensor: Of its dtype and shape.

        Raises:
            ValueError: It has another size.
        """
        place, data = self._places[name], tensor.tobytes()
        if len(data) != place.length:
            raise ValueError(f"{name} has {len(data)} bytes; its place has {place.length}")
        with (self._graph.parent / place.file).open("r+b") as file:
            file.seek(place.offset)
            file.write(data)
        self._written[name] = zlib.crc32(data)
        self._refer(name)

    def finish(self, progress: Callable[[int, int], None]) -> None:
        """Evaluates and writes the tensors that are not yet there, one by one, then the graph.

        Args:
            progress: Called before each tensor with tensors done and tensors in all.
        """
        for number, name in enumerate(self._places):
            progress(number, len(self._places))
            tensor = self._model.graph.initializers[name].const_value
            if not self.holds(name) and tensor is not None:
                self.write(name, tensor)
        ir.save(self._model, self._graph)
        # By path: a model of more than 2 GB is no protobuf message.
        onnx.checker.check_model(self._graph)

    def _refer(self, name: str) -> None:
        value, place = self._model.graph.initializers[name], self._places[name]
        if value.dtype is None or value.shape is None:
            raise TypeError(f"initializer {name} lacks a dtype or a shape")
        value.const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            place.length,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=self._graph.parent,
        )
        self._done.add(name)

    def _checksum(self, place: _Place) -> int:
        checksum, left = 0, place.length
        with (self._graph.parent / place.file).open("rb") as file:
            file.seek(place.offset)
            while left > 0:
                data = file.read(min(left, _CHUNK_BYTES))
                checksum, left = zlib.crc32(data, checksum), left - len(data)
        return checksum


def _places(model: ir.Model, name: str, limit: int) -> dict[str, _Place]:
    places, number, end = {}, 0, 0
    for initializer, tensor in _outside(model):
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        if offset + tensor.nbytes > limit and end:
            number, offset = number + 1, 0
        places[initializer] = _Place(f"{name}.{number}" if number else name, offset, tensor.nbytes)
        end = offset + tensor.nbytes
    return places


def _outside(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and (isinstance(tensor, ir.LazyTensor) or tensor.nbytes > _INLINE_BYTES):
            yield name, tensor


def _largest_file(folder: Path) -> int:
    """Returns the size that a file system can hold in one file: 4 GiB on FAT, practically no limit elsewhere."""
    bits = 0
    # Not every system knows the question.
    with contextlib.suppress(OSError, ValueError):
        # The number of bits of a signed size.
        bits = os.pathconf(folder, "PC_FILESIZEBITS")
    return (1 << (min(bits, 64) - 1)) - 1 if bits > 0 else (1 << 63) - 1
