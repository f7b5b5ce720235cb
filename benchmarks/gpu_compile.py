"""Compiles kernels to machine code in several processes, which import neither PyTorch nor a driver."""

from __future__ import annotations

import base64
import gzip
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qavp_export.engines.kernels.compile import CompiledKernel, KernelSpec, compile_kernel
from qavp_export.errors import QavpError


@dataclass(frozen=True)
class Binary:
    """A kernel as machine code.

    Attributes:
        compiled: The kernel.
        cubin: Its machine code.
        registers: Of each thread.
        spilled_bytes: What each thread stores for want of registers.
    """

    compiled: CompiledKernel
    cubin: bytes
    registers: int
    spilled_bytes: int


def spec_key(spec: KernelSpec) -> str:
    """Returns a specification as text that is the same in every process: a set's own order is not."""
    fields = asdict(replace(spec, signature={}, constants={}, aligned=frozenset()))
    return repr((fields, dict(spec.signature), dict(spec.constants), sorted(spec.aligned)))


def write_binaries(file: Path, specs: Sequence[KernelSpec], binaries: Iterable[Binary]) -> None:
    """Writes compiled kernels for a machine whose Triton is another, or none."""
    entries = {
        spec_key(spec): {**asdict(binary), "cubin": base64.b64encode(binary.cubin).decode("ascii")}
        for spec, binary in zip(specs, binaries, strict=True)
    }
    with gzip.open(file, "wt", encoding="utf-8") as out:
        json.dump(entries, out)


def read_binaries(file: Path) -> dict[str, Binary]:
    """Reads what `write_binaries` wrote: by the specification's text."""
    with gzip.open(file, "rt", encoding="utf-8") as entries:
        return {key: _binary(entry) for key, entry in json.load(entries).items()}


def _binary(entry: dict[str, Any]) -> Binary:
    compiled = entry["compiled"]
    arguments = tuple((name, kind) for name, kind in compiled["arguments"])
    return Binary(
        CompiledKernel(**{**compiled, "arguments": arguments}),
        base64.b64decode(entry["cubin"]),
        entry["registers"],
        entry["spilled_bytes"],
    )


def compile_all(specs: Sequence[KernelSpec], capability: int) -> Iterator[Binary]:
    """Compiles kernels for one compute capability, and yields them in order."""
    # A forked process would inherit the GPU's context, which does not work in it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        yield from pool.map(_compile, specs, [capability] * len(specs))


def _compile(spec: KernelSpec, capability: int) -> Binary:
    import triton

    # PTX for 8.0 runs on all that came before Hopper; later PTX on its own architecture alone.
    compiled = compile_kernel(spec, capability if capability >= 90 else 80)
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    tool = "ptxas-blackwell" if capability >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(compiled.ptx, encoding="ascii")
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        command = [path, "-v", f"-arch={architecture}", source, "-o", target]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise QavpError(f"{compiled.name} does not assemble for {architecture}: {result.stderr.strip()}")
        registers, spilled = (
            re.findall(pattern, result.stderr) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        )
        return Binary(compiled, target.read_bytes(), int(registers[0]), int(spilled[0]))
