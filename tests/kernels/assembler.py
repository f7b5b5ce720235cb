"""Assembles PTX with the assemblers inside Triton's package, and reads their resource reports."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton

from qavp_export.engines.kernels.compile import CompiledKernel

# The GPU generations that bundles are built for. PTX for compute capability 8.0 must assemble for all of them.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Assembled:
    """What the assembler made of a kernel.

    Attributes:
        cubin: The machine code.
        registers: Registers of each thread.
        spilled_bytes: Bytes that each thread stores to local memory for want of registers.
        stack_bytes: Local memory of each thread.
    """

    cubin: bytes
    registers: int
    spilled_bytes: int
    stack_bytes: int


def assemble(compiled: CompiledKernel, architecture: str) -> Assembled:
    """Assembles a kernel for an architecture such as `sm_89`, or `sm_90a` for PTX of capability 90.

    Raises:
        ValueError: The assembler refuses the PTX.
    """
    blackwell = int(re.sub(r"\D", "", architecture)) >= 100
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if blackwell else "ptxas")
    with TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(compiled.ptx)
        command = [str(tool), "-v", f"-arch={architecture}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        report = result.stderr + result.stdout
        if result.returncode:
            raise ValueError(f"ptxas refuses {compiled.name} for {architecture}: {report}")
        return Assembled(
            cubin=cubin.read_bytes(),
            registers=_number(r"Used (\d+) registers", report),
            spilled_bytes=_number(r"(\d+) bytes spill stores", report),
            stack_bytes=_number(r"(\d+) bytes stack frame", report),
        )


def _number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise ValueError(f"ptxas reports no {pattern!r}: {report}")
    return int(found[1])
