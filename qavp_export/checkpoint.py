"""A checkpoint in the Hugging Face layout: its config, its tensors one by one, and the files a bundle copies.

A checkpoint is untrusted input: only JSON and safetensors are read, no name may lead out of the given folder,
and no tensor is loaded before its size has been checked.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qavp_export.errors import CheckpointError
from qavp_export.safetensors_index import (
    TensorInfo,
    find_weights,
    read_json_file,
    reading,
    refuse_lfs_pointer,
    shown,
)

__all__ = ["FLOAT_DTYPES", "Checkpoint", "TensorInfo", "read_config"]

_CONFIG_LIMIT = 16_000_000
_FINITE_CHUNK = 1 << 16

_NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype("<u1"),
        "I8": np.dtype("<i1"),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype("<f4"),
        "F64": np.dtype("<f8"),
    }
)

# The exponent bits: a value is infinite or NaN exactly when all of them are set (IEEE 754; bfloat16 alike).
_EXPONENT_MASKS: Mapping[str, np.generic] = MappingProxyType(
    {
        "F16": np.uint16(0x7C00),
        "BF16": np.uint16(0x7F80),
        "F32": np.uint32(0x7F80_0000),
        "F64": np.uint64(0x7FF0_0000_0000_0000),
    }
)

FLOAT_DTYPES: Collection[str] = tuple(_EXPONENT_MASKS)
"""The safetensors dtypes of ordinary weights."""

_EXTRA_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Opening reads config.json and the safetensors headers, no weight.

    Attributes:
        folder: The checkpoint's folder.
        config: config.json as parsed.
        tensors: Every tensor by name, in the order of its file and data. Read-only.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Opens the checkpoint in `folder`.

        Raises:
            CheckpointError: The folder, its config or its weights are missing, incomplete, corrupt, or
                pickle-only.
        """
        config = read_config(folder)
        with reading(folder):
            tensors = find_weights(folder)
        return cls(folder, config, MappingProxyType(tensors))

    @property
    def total_bytes(self) -> int:
        """The size of all tensors' data in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> dict[str, Any]:
        """Returns JSON values that change when the checkpoint does: configuration, sizes and times of files."""
        files = {info.file.name: info.file.stat() for info in self.tensors.values()}
        return {
            "config": dict(self.config),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(files.items())},
        }

    @property
    def needs_remote_code(self) -> bool:
        """Whether config.json or one of its sub-configs asks for Python code shipped with the checkpoint."""
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        return any("auto_map" in part for part in parts)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Reads one tensor, and only that one, into memory.

        A copy, not a memory map: a file that shrinks while it is mapped would kill the process.

        Returns:
            An array of the stored shape and dtype; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: There is no such tensor, its dtype has no array type here (8-bit floats and
                narrower), or its file cannot be read.
        """
        info = self._info(name)
        dtype = _NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"tensor {shown(name)} in {info.file} is stored as {info.dtype}, which cannot be read; use a "
                "checkpoint in float16, bfloat16 or float32"
            )
        array = np.empty(info.shape, dtype)
        with reading(info.file), info.file.open("rb") as file:
            file.seek(info.offset)
            count = file.readinto(array.reshape(-1).view(np.uint8).data) if info.nbytes else 0
        if count != info.nbytes:
            raise CheckpointError(
                f"{info.file} shrank since it was opened: tensor {shown(name)} has {count} of "
                f"its {info.nbytes} bytes; download it again"
            )
        return array

    def read_checked(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Reads one tensor that must have the given shape, a float dtype and finite values.

        Returns:
            An array of `shape`: float16, bfloat16, float32 or float64, as stored.

        Raises:
            CheckpointError: The tensor is missing, or has another shape, an integer dtype, or NaN or
                infinite values.
        """
        self.check_expected({name: shape})
        info = self.tensors[name]
        array = self.read(name)
        count, first = _count_non_finite(array, _EXPONENT_MASKS[info.dtype])
        if count:
            index = tuple(int(i) for i in np.unravel_index(first, shape))
            raise CheckpointError(
                f"tensor {shown(name)} in {info.file} has {_count(count, 'NaN or infinite value')}, the "
                f"first at index {index}; the weights are damaged: download or convert them again"
            )
        return array

    def check_expected(
        self,
        expected: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, Collection[str]] = MappingProxyType({}),
    ) -> None:
        """Checks, without reading weights, that every expected tensor exists in the expected shape and dtype.

        Args:
            expected: Shapes by tensor name. Tensors beyond these are ignored.
            dtypes: Allowed safetensors dtypes by tensor name; `FLOAT_DTYPES` for a tensor that it lacks.

        Raises:
            CheckpointError: Tensors are missing, or of another shape or dtype; one line names the first three
                of each.
        """
        known = {name: self.tensors[name] for name in expected if name in self.tensors}
        missing = [shown(name) for name in expected if name not in known]
        shapes = [
            f"{shown(name)} in {info.file.name} has shape {info.shape}, expected {tuple(expected[name])}"
            for name, info in known.items()
            if info.shape != tuple(expected[name])
        ]
        allowed = {name: dtypes.get(name, FLOAT_DTYPES) for name in known}
        stored = [
            f"{shown(name)} in {info.file.name} is stored as {info.dtype}, expected {' or '.join(allowed[name])}"
            for name, info in known.items()
            if info.dtype not in allowed[name]
        ]
        problems = [
            f"{_count(len(found), 'tensor')} {fault} ({_first_three(found)})"
            for fault, found in (("missing", missing), ("of wrong shape", shapes), ("of wrong dtype", stored))
            if found
        ]
        if not problems:
            return
        advice = "check that both come from the same model, or download it again"
        if stored or any(name.endswith((".qweight", ".weight_packed")) for name in self.tensors):
            advice += "; a quantized checkpoint needs the quantization_config that its quantizer wrote"
        raise CheckpointError(
            f"the weights in {self.folder} do not fit its config.json: {'; '.join(problems)}; {advice}"
        )

    def extra_files(self) -> list[Path]:
        """Lists the files a bundle copies: configs, tokenizer, processor, chat template; no weights.

        Returns:
            Paths inside the folder, sorted by name.

        Raises:
            CheckpointError: One of them is a Git LFS pointer or cannot be read.
        """
        with reading(self.folder):
            names = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        chosen = [self.folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in _EXTRA_FILES)]
        for path in chosen:
            with reading(path), path.open("rb") as file:
                refuse_lfs_pointer(path, file.read(64))
        return chosen

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {shown(name)}; check that its config.json and weights belong together"
            )
        return info


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json alone: all that a dry run needs.

    Raises:
        CheckpointError: The folder or its config.json is missing, unreadable, or not a JSON object.
    """
    path = folder / "config.json"
    try:
        found, is_folder = path.is_file(), folder.is_dir()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise CheckpointError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
        found = is_folder = False
    if not is_folder:
        raise CheckpointError(f"checkpoint folder {shown(str(folder))} does not exist; check the path")
    if not found:
        raise CheckpointError(
            f"{folder} has no config.json; "
            "give the folder of a Hugging Face checkpoint, which has it beside the weights"
        )
    return read_json_file(path, _CONFIG_LIMIT)


def _count_non_finite(array: npt.NDArray[Any], mask: np.generic) -> tuple[int, int]:
    """Counts NaN and infinite values chunk by chunk.

    Returns:
        Their number and the flat index of the first, or -1 if there is none.
    """
    bits = array.reshape(-1).view(mask.dtype)
    count, first = 0, -1
    for start in range(0, bits.size, _FINITE_CHUNK):
        bad = (bits[start : start + _FINITE_CHUNK] & mask) == mask
        if bad.any():
            first = start + int(bad.argmax()) if first < 0 else first
            count += int(bad.sum())
    return count, first


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _first_three(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more
