"""What a plugin is, said without TensorRT: its tensors, its settings, and the kernel that runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar

from qavp_export.engines.kernels.compile import CompiledKernel, KernelSpec, compile_kernel
from qavp_export.errors import InputError

Setting = int | float

# Triton's names of TensorRT's types.
_TRITON: Mapping[str, str] = MappingProxyType({"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "i8"})


@dataclass(frozen=True)
class Tensor:
    """A tensor of a plugin while TensorRT chooses and launches its kernels.

    Attributes:
        dtype: Triton's name of its type.
        sizes: Its shape; -1 where the network leaves a size open.
        opt: Its shape at the profile's usual sizes.
        most: Its shape at the profile's largest sizes.
        exprs: Its shape as TensorRT's expressions.
    """

    dtype: str
    sizes: tuple[int, ...]
    opt: tuple[int, ...]
    most: tuple[int, ...]
    exprs: tuple[Any, ...]

    @classmethod
    def of(cls, desc: Any) -> Tensor:
        """Reads a `tensorrt.plugin.TensorDesc` that has a shape.

        Raises:
            InputError: Kernels do not take its type.
        """
        if desc.dtype.name not in _TRITON:
            raise InputError(f"the plugins take {', '.join(_TRITON)} tensors, not {desc.dtype.name}")
        sizes = tuple(desc.shape)
        opt, most = (desc.shape.opt, desc.shape.max) if desc.shape.is_dynamic else (sizes, sizes)
        return cls(_TRITON[desc.dtype.name], sizes, tuple(opt), tuple(most), tuple(desc.shape_expr))

    def size(self, axis: int) -> int:
        """Returns a size that kernels are compiled for.

        Raises:
            InputError: The network leaves it open.
        """
        if self.sizes[axis] < 0:
            raise InputError(f"axis {axis} of a plugin's input of shape {list(self.sizes)} must have a fixed size")
        return self.sizes[axis]

    @property
    def rows(self) -> Any:
        """Returns how many vectors it has along its last axis, as an expression."""
        total = self.exprs[0]
        for expr in self.exprs[1:-1]:
            total = total * expr
        return total

    @property
    def usual_rows(self) -> int:
        """Returns the same at the profile's usual sizes."""
        return prod(self.opt[:-1])

    @property
    def most_rows(self) -> int:
        """Returns the same at the profile's largest sizes."""
        return prod(self.most[:-1])


@dataclass(frozen=True)
class Launch:
    """How a plugin runs.

    Attributes:
        kernel: What is launched: inputs, then `scalars`, then outputs.
        grid: Programs along each axis: numbers or expressions.
        scalars: 32-bit integers: numbers or expressions.
    """

    kernel: CompiledKernel
    grid: tuple[Any, Any, Any]
    scalars: tuple[Any, ...] = ()


class Compiler:
    """Compiles kernels for one compute capability, each once: layers of the same sizes share them.

    Args:
        capability: Compute capability, such as 80.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._kernels: dict[tuple[object, ...], CompiledKernel] = {}

    def __call__(self, spec: KernelSpec) -> CompiledKernel:
        """Returns a compiled kernel."""
        fixed = (spec.module, spec.function, spec.num_warps, spec.num_stages, spec.aligned)
        # 1, 1.0 and True are equal, and not the same to a kernel.
        constants = tuple((name, repr(value)) for name, value in spec.constants.items())
        key = (*fixed, constants, tuple(spec.signature.items()))
        if key not in self._kernels:
            self._kernels[key] = compile_kernel(spec, self.capability)
        return self._kernels[key]


class Plugin(ABC):
    """One plugin.

    Attributes:
        name: The operator's name, which is the function's.
        inputs: Names of its inputs.
        settings: Types of its attributes.
        outputs: TensorRT's names of its outputs' types.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    settings: ClassVar[Mapping[str, type]]
    outputs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns the outputs' shapes: expressions and numbers, made of the inputs' expressions and the attributes."""

    def tactics(self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], compiler: Compiler) -> list[int]:
        """Returns the tactics that are worth timing, positive numbers; one, unless a plugin has several."""
        del inputs, settings, compiler
        return [1]

    @abstractmethod
    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns the kernel and how it is launched.

        Args:
            inputs: The inputs.
            settings: The attributes.
            tactic: One of `tactics`.
            compiler: Compiles kernels.
            cdiv: Divides an expression by a number and rounds up.
        """
