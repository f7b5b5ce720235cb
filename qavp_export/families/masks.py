"""Attention masks of decoders that are not causal throughout, by index arithmetic that traces to few operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Indices:
    """Where queries and keys stand in the cache that this step leaves behind.

    Attributes:
        queries: `[S,1]`.
        keys: `[1,T]`, of which the last S are the queries' own.
        valid: Keys that are no padding `[B,1,1,T]`, bool.
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, sequence: int) -> Indices:
        """Reads them from an `attention_mask [B,T]` for the last `sequence` tokens."""
        total = attention_mask.shape[1]
        keys = torch.arange(total, device=attention_mask.device).unsqueeze(0)
        queries = torch.arange(sequence, device=attention_mask.device).unsqueeze(1) + (total - sequence)
        return cls(queries, keys, attention_mask.bool()[:, None, None, :])

    @property
    def causal(self) -> Tensor:
        """Keys not behind their query `[S,T]`."""
        return self.keys <= self.queries

    def within(self, window: int) -> Tensor:
        """Keys less than `window` before their query, and all behind it `[S,T]`."""
        return self.keys > self.queries - window


def for_attention(allowed: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Returns a mask `[B,1,S,T]` as transformers' attention takes it: bool for `sdpa`, added to logits for `eager`."""
    if implementation == "sdpa":
        return allowed
    return torch.where(allowed, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))
