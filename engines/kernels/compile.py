"""Compiles Triton kernels to PTX ahead of time; needs no GPU and no driver.

PTX for compute capability 8.0 runs on every later GPU, compiled by its driver. From 9.0 on Triton compiles for the
architecture itself (`sm_90a`), and the PTX runs on no other.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from qavp_export.errors import UnavailableError

Constant: TypeAlias = int | float | bool | None

# Triton's kernels end in pointers to scratch memory that its own launcher passes.
_HIDDEN_ARGUMENTS = 2
_ENTRY = re.compile(r"(?P<head>\.visible \.entry (?P<name>\w+)\s*\(\n)(?P<arguments>.*?)(?P<tail>\n\))", re.DOTALL)


@dataclass(frozen=True)
class KernelSpec:
    """A Triton kernel and what it is compiled for.

    Attributes:
        module: Module of the `triton.jit` function.
        function: Its name.
        signature: Triton types of the run-time arguments, in the function's order: `*fp16`, `i32`.
        constants: The other arguments, which are compiled in.
        num_warps: Warps of each program.
        num_stages: Depth of software pipelines.
        aligned: Run-time arguments that are multiples of 16: pointers, strides.
        max_registers: Most registers of a thread; None leaves it to the assembler.
    """

    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Constant]
    num_warps: int
    num_stages: int = 3
    aligned: frozenset[str] = frozenset()
    max_registers: int | None = None


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as PTX.

    Attributes:
        name: The entry's name.
        ptx: One entry, which takes `arguments` and nothing else.
        num_warps: Warps of each program: a block has 32 times as many threads.
        shared_bytes: Dynamic shared memory of each block.
        capability: The compute capability that it was compiled for, such as 80.
        arguments: Names and Triton types of what a launch passes, in order.
    """

    name: str
    ptx: str
    num_warps: int
    shared_bytes: int
    capability: int
    arguments: tuple[tuple[str, str], ...]


def compile_kernel(spec: KernelSpec, capability: int) -> CompiledKernel:
    """Compiles a kernel to PTX that the drivers of CUDA 12.4 load (of CUDA 12.9 from compute capability 10.0 on).

    Multiplications and additions are fused only where the kernel says so.

    Args:
        spec: The kernel.
        capability: Compute capability, such as 80 or 90.

    Raises:
        UnavailableError: Triton is not installed, or this process interprets kernels.
        ValueError: The specification does not fit the function.
    """
    try:
        import triton  # type: ignore[import-untyped]
        from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
        from triton.compiler import ASTSource  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnavailableError(
            f"kernels are compiled by Triton, which is not installed ({error}): pip install triton"
        ) from error
    kernel = getattr(importlib.import_module(spec.module), spec.function)
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise UnavailableError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")
    _check_arguments(spec, kernel.arg_names)
    signature = {name: spec.signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name in spec.aligned
    }
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": False,
        "maxnreg": spec.max_registers,
        "ptx_version": 84 if capability < 100 else 88,
    }
    source = ASTSource(kernel, signature, dict(spec.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    _check_scratch(spec, compiled.metadata)
    name, ptx = without_hidden_arguments(compiled.asm["ptx"], len(spec.signature))
    return CompiledKernel(
        name=name,
        ptx=ptx,
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        capability=capability,
        arguments=tuple(spec.signature.items()),
    )


def without_hidden_arguments(ptx: str, declared: int) -> tuple[str, str]:
    """Removes the scratch pointers behind an entry's declared arguments.

    Args:
        ptx: What Triton compiled: one entry.
        declared: The entry's own arguments.

    Returns:
        The entry's name and the PTX.

    Raises:
        ValueError: The entry has other arguments, or reads a scratch pointer.
    """
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise ValueError(f"expected one entry in the PTX and found {len(entries)}")
    entry = entries[0]
    arguments = [line.rstrip(",") for line in entry["arguments"].splitlines()]
    if len(arguments) != declared + _HIDDEN_ARGUMENTS:
        raise ValueError(f"{entry['name']} has {len(arguments)} arguments; expected {declared} + {_HIDDEN_ARGUMENTS}")
    for hidden in arguments[declared:]:
        name = hidden.split()[-1]
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise ValueError(f"{entry['name']} reads its scratch pointer {name}")
    kept = ",\n".join(arguments[:declared])
    return entry["name"], ptx[: entry.start("arguments")] + kept + ptx[entry.end("arguments") :]


def _check_arguments(spec: KernelSpec, names: list[str]) -> None:
    passed = [name for name in names if name not in spec.constants]
    unknown = (set(spec.constants) | spec.aligned) - set(names)
    if passed != list(spec.signature) or unknown:
        raise ValueError(
            f"{spec.function} takes {names}; the specification passes {passed}, unknown: {sorted(unknown)}"
        )


def _check_scratch(spec: KernelSpec, metadata: Any) -> None:
    sizes = {name: getattr(metadata, name) for name in ("global_scratch_size", "profile_scratch_size")}
    if any(sizes.values()):
        raise ValueError(f"{spec.function} needs scratch memory, which no launcher gives it: {sizes}")
