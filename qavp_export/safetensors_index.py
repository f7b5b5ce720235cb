"""Where a checkpoint's tensors lie: safetensors headers and the index of a sharded checkpoint.

Only headers are read, with the standard library, and every number in them is checked against the file before
anything is allocated: the files are untrusted input. The format (safetensors README, "Format"): eight bytes
of header length, a JSON header, then the tensors' bytes without gap or overlap.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qavp_export.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on a header; also used for the index."""

_MAX_RANK = 64  # NumPy's limit
_MAX_SIZE = 2**63 - 1
_LFS_PREFIX = b"version https://git-lfs"
_PICKLES = ("*model*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
        "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    }
)  # fmt: skip
"""Bits per element of every safetensors dtype (safetensors 0.8)."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it.

    Attributes:
        name: The tensor's name in the checkpoint.
        dtype: The safetensors dtype name, for example `F16`.
        shape: The tensor's shape.
        nbytes: The size of its data in bytes.
        file: The file that holds it.
        offset: Where its data starts, in bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def shown(name: object) -> str:
    """Returns an untrusted name fit for a one-line message: control characters escaped, long names cut.

    Of anything but a string only the type is shown.
    """
    if not isinstance(name, str):
        return f"<{type(name).__name__}>"
    printable = name if name.isprintable() else repr(name)
    return printable if len(printable) <= 200 else f"{printable[:200]}..."


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an operating system error inside the block into a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot read {path}: {reason}; check the file and its permissions") from error


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """Raises CheckpointError if a file that begins with `start` is a Git LFS pointer, not the file itself."""
    if start.startswith(_LFS_PREFIX):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")


def parse_json_object(path: Path, data: bytes, what: str) -> dict[str, Any]:
    """Parses untrusted JSON that must be an object without duplicate keys.

    Args:
        path: The file the bytes come from, for messages.
        data: UTF-8 JSON.
        what: What the bytes are, for messages, for example `the header`.

    Raises:
        CheckpointError: The bytes are not UTF-8, not JSON, not an object, or list a key twice.
    """
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # undecodable bytes are a ValueError too
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise _corrupt(path, f"{what} is not valid JSON ({reason})") from error
    if not isinstance(parsed, dict):
        raise _corrupt(path, f"{what} is not a JSON object")
    return parsed


def read_json_file(path: Path, limit: int) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `limit` bytes.

    Raises:
        CheckpointError: The file is a Git LFS pointer, too large, unreadable, or not a JSON object.
    """
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        data = file.read(min(size, limit) + 1)  # read() allocates what it is asked for
    if len(data) > limit:
        raise _corrupt(path, f"it is larger than {limit} bytes, the limit for such a file")
    refuse_lfs_pointer(path, data)
    return parse_json_object(path, data, "the file")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads the header of one safetensors file and checks it against the file's size.

    Returns:
        The file's tensors by name, in the order of their data.

    Raises:
        CheckpointError: The file is truncated, corrupt, or a Git LFS pointer.
    """
    with reading(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS_PREFIX))
            refuse_lfs_pointer(path, start)
            header_bytes = _header_length(path, start, size)
            file.seek(8)
            header = file.read(header_bytes)
    if len(header) < header_bytes:
        raise _truncated(path, f"it shrank below {8 + header_bytes} bytes while it was read")
    data_start = 8 + header_bytes
    entries = parse_json_object(path, header, "the header")
    entries.pop("__metadata__", None)
    infos = [_parse_entry(path, name, entry, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(path, infos, data_start, size)
    return {info.name: info for info in infos}


def find_weights(folder: Path) -> dict[str, TensorInfo]:
    """Finds all tensors of the checkpoint in `folder`: `model.safetensors`, or the shards its index names.

    Raises:
        CheckpointError: There are no safetensors weights, or they are incomplete, corrupt or point elsewhere.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = _read_weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        verb = "are" if others else "is"
        raise CheckpointError(
            f"{missing[0]}{others} {verb} missing from {folder}, though {INDEX_FILE} names it; "
            "download the checkpoint again"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {shown(name)} is in both {tensors[name].file.name} and {shard} of {folder}; "
                    "the shards come from different checkpoints: download it again"
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise _corrupt(index, f"it puts tensor {shown(name)} in {shard}, which lacks it")
    return tensors


def _corrupt(path: Path, finding: str) -> CheckpointError:
    return CheckpointError(f"{path} is corrupt: {finding}; download it again")


def _truncated(path: Path, finding: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: {finding}; download it again")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{shown(key)} is listed twice")
        result[key] = value
    return result


def _header_length(path: Path, start: bytes, size: int) -> int:
    if len(start) < 8:
        raise _truncated(path, f"a safetensors file starts with 8 bytes of length, file has {size}")
    (length,) = struct.unpack_from("<Q", start)
    if not 2 <= length <= MAX_HEADER_BYTES:
        limit = f"a header has 2 to {MAX_HEADER_BYTES}"
        raise _corrupt(path, f"it announces a header of {length} bytes, but {limit}")
    if 8 + length > size:
        raise _truncated(path, f"header says at least {8 + length} bytes, file has {size}")
    return int(length)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE  # type(): a bool is an int too


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    tensor = f"in its header, tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise _corrupt(path, f"{tensor} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(path, f"{tensor} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise _corrupt(path, f"{tensor} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _corrupt(path, f"{tensor} has no valid data_offsets")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    # An empty tensor may carry dimensions that no array can have.
    if bits % 8 or bits // 8 != end - begin or math.prod(max(dim, 1) for dim in shape) * 8 > _MAX_SIZE:
        layout = f"{dtype} and shape {shown(str(tuple(shape)))}"
        raise _corrupt(path, f"{tensor} takes bytes {begin} to {end}, which does not fit {layout}")
    return TensorInfo(name, dtype, tuple(shape), end - begin, path, data_start + begin)


def _check_layout(path: Path, infos: list[TensorInfo], data_start: int, size: int) -> None:
    """Checks that the tensors cover the rest of the file exactly, as the format demands."""
    end = data_start
    for info in infos:
        if info.offset != end:
            fault = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise _corrupt(path, f"in its header, tensor {shown(info.name)} {fault}")
        end += info.nbytes
    if end > size:
        raise _truncated(path, f"header says {end} bytes, file has {size}")
    if end < size:
        raise _corrupt(path, f"header says {end} bytes, file has {size}")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_file(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _corrupt(index, "it has no weight_map, or an empty one")
    for name, shard in weight_map.items():
        # The name is checked, not where it leads: the Hub's cache links its files to ../../blobs.
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} puts tensor {shown(name)} in {shown(shard)}, which is not the plain name of a "
                ".safetensors file in that folder; do not trust this checkpoint, get it from its source"
            )
        if not shard.isprintable() or len(shard) > 200:
            raise _corrupt(index, f"it names the file {shown(shard)}, which cannot exist")
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    neither = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    if strays := [name for name in files if name.endswith(".safetensors")]:
        return CheckpointError(f"{folder} has {shown(strays[0])} but {neither}; download the whole checkpoint")
    pickles = [name for name in files if any(fnmatchcase(name, pattern) for pattern in _PICKLES)]
    if pickles:
        return CheckpointError(
            f"{folder} has only pickle weights ({shown(pickles[0])}), never loaded here because they can "
            "run code; if you trust them, convert them to safetensors with Hugging Face transformers: "
            'AutoModelForImageTextToText.from_pretrained("OLD").save_pretrained("NEW")'
        )
    return CheckpointError(f"{folder} has no weights: {neither}; download the whole checkpoint")
