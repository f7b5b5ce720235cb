"""Triton's names of the data types that kernels read."""

from __future__ import annotations

from qavp_export.errors import InputError

# The widest that a thread reads at once.
_LOAD_BYTES = 16
_VALUE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def load_values(dtype: str) -> int:
    """Returns how many values of a type one load reads.

    Args:
        dtype: `fp16`, `bf16` or `fp32`.

    Raises:
        InputError: Kernels do not read it.
    """
    if dtype not in _VALUE_BYTES:
        raise InputError(f"kernels read {', '.join(_VALUE_BYTES)}, not {dtype}")
    return _LOAD_BYTES // _VALUE_BYTES[dtype]
