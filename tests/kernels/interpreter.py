"""Runs kernels in Triton's interpreter, in a process of its own.

`TRITON_INTERPRET` must be set before Triton is imported and makes compiling impossible, so the tests' own process never
sets it: there kernels are compiled. Nothing here may import Triton at module level.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qavp_export.engines.kernels.compile import KernelSpec

Array: TypeAlias = npt.NDArray[Any]
Grid: TypeAlias = tuple[int, int, int]


class Interpreter:
    """A process that interprets kernels: a context manager. It starts once; a run costs what the kernel costs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
        )

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # At the end of its input it exits.
        self._process.communicate()

    def run(self, spec: KernelSpec, grid: Grid, arguments: Mapping[str, Array | int | float]) -> dict[str, Array]:
        """Launches a kernel.

        Args:
            spec: The kernel; of its types and warps the interpreter knows nothing.
            grid: Programs along each axis.
            arguments: The run-time arguments by name: C-contiguous arrays (bfloat16 as ml_dtypes') and numbers. Poison
                outputs, and make them no larger than the kernel may write: the interpreter checks no bounds.

        Returns:
            All arrays as the kernel left them, by name; the caller's are unchanged.
        """
        if list(arguments) != list(spec.signature):
            raise ValueError(f"{spec.function} takes {list(spec.signature)}, not {list(arguments)}")
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the interpreter has no pipes")
        pickle.dump((spec, grid, dict(arguments)), self._process.stdin)
        self._process.stdin.flush()
        try:
            results: dict[str, Array] | str = pickle.load(self._process.stdout)
        except EOFError as error:
            raise RuntimeError(f"the interpreter died of {spec.function}") from error
        if isinstance(results, str):
            raise RuntimeError(results)
        return results


def _serve() -> None:
    """Runs what comes in until the input ends."""
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            spec, grid, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            results: dict[str, Array] | str = _run(spec, grid, arguments)
        except Exception:
            results = traceback.format_exc()
        pickle.dump(results, answers)
        answers.flush()


def _run(spec: KernelSpec, grid: Grid, arguments: dict[str, Array | int | float]) -> dict[str, Array]:
    import torch

    torch.set_num_threads(1)
    kernel = getattr(importlib.import_module(spec.module), spec.function)
    passed: dict[str, Any] = {}
    for name, value in arguments.items():
        if not isinstance(value, np.ndarray):
            passed[name] = value
        elif value.dtype == ml_dtypes.bfloat16:
            passed[name] = torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        else:
            passed[name] = torch.from_numpy(value.copy())
    kernel[grid](**passed, **spec.constants)
    results: dict[str, Array] = {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            tensor = passed[name]
            raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            results[name] = raw.numpy().view(value.dtype)
    return results


if __name__ == "__main__":
    _serve()
