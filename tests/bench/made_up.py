"""Contestants without processes, and timings that are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qavp_export.bench.contestant import Entry, Loaded
from qavp_export.bench.load import LoadRun
from qavp_export.bench.request import Request, Sample
from qavp_export.errors import QavpError, UnavailableError

MS = 1e-3


def sample(milliseconds: float, tokens: int = 3, answer: str = "w1 w2 w3", vision_tokens: int = 2) -> Sample:
    """Every stage takes a part of `milliseconds` that is easy to tell: 1, 2, 3, 4, 5 times it, and the rest 1."""
    unit = milliseconds * MS
    decode = [5 * unit] * (tokens - 1)
    return Sample(
        preprocess=unit,
        vision_encoder=2 * unit,
        embedding=3 * unit,
        prefill=4 * unit,
        decode=decode,
        ttft=10 * unit,
        tpot=5 * unit if tokens > 1 else None,
        end_to_end=11 * unit + sum(decode),
        prompt_tokens=7,
        vision_tokens=vision_tokens,
        vision_tokens_before=4,
        answer_tokens=tokens,
        answer=answer,
    )


class MadeUp:
    """A contestant that takes 1, 2, 3, ... times its speed, and writes down what it is asked."""

    def __init__(self, entry: Entry, log: list[tuple[str, str]], speed: float = 1.0, fails_at: int = 0) -> None:
        self.entry = entry
        self.loaded = Loaded(load_seconds=0.5, host_before_bytes=100, device=None)
        self.open = False
        self._log = log
        self._speed = speed
        self._fails_at = fails_at
        self._runs = 0

    def __enter__(self) -> MadeUp:
        self.open = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.open = False

    def run(self, request: Request) -> Sample:
        self._runs += 1
        self._log.append((self.entry.engine, request.prompt))
        if self._runs == self._fails_at:
            raise QavpError("its process was killed")
        return sample(self._runs * self._speed)

    def device_peak(self) -> int | None:
        self._log.append((self.entry.engine, "device memory"))
        return None

    def host_peak(self) -> int:
        return 2_000_000

    def load(self, requests: Sequence[Request], clients: int, duration: float) -> LoadRun:
        return LoadRun(clients, duration, tuple(sample(1) for _ in requests))

    def scoring(self, repeats: int) -> tuple[list[float], list[float]]:
        if self.entry.engine == "tensorrt":
            raise UnavailableError("one serialized engine")
        return [0.005] * repeats, [0.003] * repeats


def requests(count: int) -> tuple[Request, ...]:
    return tuple(Request((f"{number}.png",), f"question {number}", 3) for number in range(count))


def entries(bundle: Path, *engines: str) -> tuple[Entry, ...]:
    return tuple(Entry(bundle, engine, "tiny") for engine in engines)
