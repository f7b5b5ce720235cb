"""Kernels of the tests' own, around parts of the package's: only the interpreter's process imports this."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qavp_export.engines.kernels.matmul import _existing_tokens


@triton.jit
def existing_tokens(last, first_token, result, SIZE: tl.constexpr):
    """Tokens that a program reads, `[SIZE]`."""
    token = tl.arange(0, SIZE)
    tl.store(result + token, _existing_tokens(token, last, first_token, SIZE))
