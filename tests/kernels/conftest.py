"""How kernels are tested without a GPU.

Two processes, because Triton either interprets or compiles:
- `interpreter` runs a kernel on NumPy arrays in a process of its own (`tests/kernels/interpreter.py`):
  `interpreter.run(spec, grid, {"x": x, ..., "y": poisoned})` returns the arrays. The tests' process never sets
  TRITON_INTERPRET, whatever else the same pytest-xdist worker has imported.
- `compile_kernel(spec, capability)` and `tests.kernels.assembler.assemble(compiled, arch)` run in the tests' process.
Results and code are tested for the same specifications.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Interprets kernels in one other process."""
    with Interpreter() as started:
        yield started
