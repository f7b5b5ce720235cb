"""How kernels round to integers, which GPUs do by an addition."""

from __future__ import annotations

import triton.language as tl  # type: ignore[import-untyped]

# Adding and subtracting 1.5 * 2^23 rounds to an integer, half-way cases to even.
ROUND: tl.constexpr = tl.constexpr(12582912.0)
