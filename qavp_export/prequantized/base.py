"""What a layout of quantized weights is, and the tensors of one quantized module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import CheckpointError
from qavp_export.prequantized.integers import FloatArray, IntArray
from qavp_export.safetensors_index import shown

SCALE_DTYPES = ("F16", "BF16", "F32")
INDEX_DTYPES = ("I32", "I64")
PACKED_DTYPES = ("I32",)

# Times the largest difference of two codes still finite in float32.
_LARGEST_SCALE = float(np.finfo(np.float32).max) / 2**9


@dataclass(frozen=True)
class Part:
    """What one of the tensors that make up a weight must be.

    Attributes:
        shape: Its shape.
        dtypes: The safetensors dtypes that it may have.
    """

    shape: tuple[int, ...]
    dtypes: Collection[str]


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one quantized module.

    Attributes:
        checkpoint: The checkpoint that holds them.
        module: The module's name in the checkpoint: its tensors are `<module>.<part>`.
    """

    checkpoint: Checkpoint
    module: str

    def name(self, part: str) -> str:
        """Returns a part's name in the checkpoint."""
        return f"{self.module}.{part}"

    def has(self, part: str) -> bool:
        """Whether the checkpoint holds a part."""
        return self.name(part) in self.checkpoint.tensors

    def read(self, part: str) -> npt.NDArray[Any]:
        """Reads a part as stored."""
        return self.checkpoint.read(self.name(part))

    def scales(self, part: str, shape: tuple[int, ...]) -> FloatArray:
        """Reads scales as float32. They may be negative: AutoRound puts -8 at the wider side of a group.

        Raises:
            CheckpointError: One is NaN, infinite, or so large that weights would be.
        """
        scales = self.checkpoint.read_checked(self.name(part), shape).astype(np.float32)
        if np.abs(scales).max(initial=0) > _LARGEST_SCALE:
            raise self.damaged(part, f"has a scale beyond {_LARGEST_SCALE:.2g}")
        return scales

    def groups(self, part: str, count: int) -> IntArray:
        """Reads the group of each input channel.

        Raises:
            CheckpointError: One is not in [0, count).
        """
        groups = self.read(part)
        outside = (groups < 0) | (groups >= count)
        if outside.any():
            first = int(outside.argmax())
            raise self.damaged(part, f"has group {groups[first]} at index {first}, outside 0..{count - 1}")
        return groups

    def damaged(self, part: str, finding: str) -> CheckpointError:
        """Returns the error for a part whose values are impossible."""
        file = self.checkpoint.tensors[self.name(part)].file
        return CheckpointError(
            f"tensor {shown(self.name(part))} in {file} {finding}; the weights are damaged, or do not belong to "
            "this config.json: download or convert them again"
        )


@dataclass(frozen=True)
class Layout(ABC):
    """How a quantizer stores the weights of linear layers.

    Attributes:
        bits: Bits per weight: 4 or 8.
        group_size: Input channels that share a scale and a zero point; -1 if all of them do.
        symmetric: Whether zero is in the middle of the codes.
        activations: How the checkpoint's own runtime quantizes activations, in words; None if it does not. Reported
            only: the weights mean the same without it, and the recipe says what becomes of activations.
        method: `quant_method` in config.json.
        own_parts: Last parts of tensor names that only quantized modules have.
        weight_dtype: The safetensors dtype of `<module>.weight` where the layout stores its codes under that name.
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: str | None
    method: ClassVar[str]
    own_parts: ClassVar[tuple[str, ...]]
    weight_dtype: ClassVar[str | None] = None

    def describe(self) -> dict[str, str | int | bool | None]:
        """Returns how the weights were quantized, as JSON values."""
        return {
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activations": self.activations,
        }

    def is_part(self, part: str, dtype: str) -> bool:
        """Whether a tensor belongs to a quantized module, by the last part of its name and its safetensors dtype."""
        return part in self.own_parts or (part == "weight" and dtype == self.weight_dtype)

    def parts(self, tensors: ModuleTensors, shape: tuple[int, ...]) -> dict[str, Part]:
        """Returns what the tensors that make up a weight must be; reads none.

        Args:
            tensors: The module's tensors.
            shape: The weight's shape `[N, K]`.

        Returns:
            The tensors by their names in the checkpoint: those that must be there, and those optional ones that are.

        Raises:
            CheckpointError: The weight is not a matrix.
        """
        if len(shape) != 2:
            raise CheckpointError(
                f"module {shown(tensors.module)} in {tensors.checkpoint.folder} is quantized, but its weight has "
                f"shape {shape}: only matrices can be read; quantize the linear layers only"
            )
        optional = self._optional()
        return {
            tensors.name(part): expected
            for part, expected in self._parts(*shape).items()
            if part not in optional or tensors.has(part)
        }

    def read(self, tensors: ModuleTensors, shape: tuple[int, ...]) -> FloatArray:
        """Reads and dequantizes one weight.

        Returns:
            float32 `[N, K]`, finite.

        Raises:
            CheckpointError: A tensor is missing, has another shape or dtype, or impossible values.
        """
        parts = self.parts(tensors, shape)
        tensors.checkpoint.check_expected(
            {name: part.shape for name, part in parts.items()}, {name: part.dtypes for name, part in parts.items()}
        )
        return self._read(tensors, *shape)

    @abstractmethod
    def _parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Returns the parts of a weight `[rows, columns]` by the last part of their names."""

    @abstractmethod
    def _read(self, tensors: ModuleTensors, rows: int, columns: int) -> FloatArray:
        """Dequantizes a weight whose parts have been checked."""

    def _optional(self) -> tuple[str, ...]:
        """Returns the parts that a module need not have."""
        return ()

    def _group_count(self, columns: int) -> int:
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    def _consecutive(self, columns: int) -> IntArray:
        """Returns the group of each input channel where groups are runs of neighbours."""
        if self.group_size == -1:
            return np.zeros(columns, np.int64)
        return np.arange(columns) // self.group_size
