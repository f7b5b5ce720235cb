"""Quantities in words."""

from __future__ import annotations


def megabytes(count: int) -> str:
    """Returns a number of bytes in MB (10^6) or GB (10^9)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
