"""What every contestant of cpu_latency.py measures alike. Standard library only: it runs in several environments."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

_FIELDS = {"anonymous": ("RssAnon", "RssShmem"), "file_backed": ("RssFile",), "peak": ("VmHWM",)}


class Contestant(Protocol):
    """A loaded model that answers one prompt again and again."""

    def first_token(self) -> tuple[int, dict[str, float]]:
        """Runs the prompt in a new context.

        Returns:
            The first token's id, and `time.perf_counter()` at the ends of the stages `vision` and `embed`, which not
            every contestant has, and of `prefill`.
        """

    def next_token(self, token: int) -> int:
        """Appends a token and returns the one after it."""


@dataclass
class Timings:
    """Seconds, one entry for each run.

    Attributes:
        vision: Pixels in memory to image features; empty without a vision tower.
        prefill: Embeddings of the prompt (llama.cpp: its token ids) to the first token's id.
        ttft: Pixels in memory to the first token's id.
        tpot: Median over the tokens after the first.
    """

    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)


def measure(contestant: Contestant, repeats: int, seconds: float, tokens: int) -> dict[str, list[float]]:
    """Measures a contestant, after a run that does not count.

    Args:
        contestant: A loaded model.
        repeats: Fewest runs that count.
        seconds: How long they take at least, all together: quick ones, which a passing disturbance hits hardest, are
            more.
        tokens: Tokens after the first, in each.
    """
    _run(contestant, tokens, Timings())
    timings = Timings()
    end = time.perf_counter() + seconds
    while len(timings.ttft) < repeats or time.perf_counter() < end:
        _run(contestant, tokens, timings)
    return asdict(timings)


def _run(contestant: Contestant, tokens: int, timings: Timings) -> None:
    started = time.perf_counter()
    token, ends = contestant.first_token()
    steps: list[float] = []
    for _ in range(tokens):
        step = time.perf_counter()
        token = contestant.next_token(token)
        steps.append(time.perf_counter() - step)
    if "vision" in ends:
        timings.vision.append(ends["vision"] - started)
    timings.prefill.append(ends["prefill"] - ends.get("embed", started))
    timings.ttft.append(ends["prefill"] - started)
    timings.tpot.append(statistics.median(steps))


def resident(pid: int | None = None) -> dict[str, int]:
    """Returns a process's bytes in memory: `anonymous` (and shared memory), `file_backed`, and the `peak` of both.

    Args:
        pid: The process; None: this one.

    Raises:
        FileNotFoundError: The process has ended and was waited for.
    """
    text = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8")
    return {kind: sum(_kilobytes(text, names)) * 1024 for kind, names in _FIELDS.items()}


def _kilobytes(status: str, names: Sequence[str]) -> list[int]:
    # A process that has ended and was not waited for has no memory and none of these lines.
    return [int(found) for name in names for found in re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)]
