"""A bundle and an engine in a process of their own, as the process that compares them sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from qavp_export.bench.load import LoadRun, load_from_dict
from qavp_export.bench.request import Request, Sample
from qavp_export.errors import InputError, QavpError, UnavailableError

_SHOWN = 300
# Production has no torch; with it, transformers would import it, and its memory would count.
_PROGRAM = "import sys; sys.modules['torch'] = None; from qavp_export.bench.worker import main; main(int(sys.argv[1]))"


class WorkerError(QavpError):
    """A contestant's process failed."""


@dataclass(frozen=True)
class Entry:
    """What is compared.

    Attributes:
        bundle: The bundle's folder.
        engine: The engine's name.
        name: What the report calls the bundle.
    """

    bundle: Path
    engine: str
    name: str

    @property
    def label(self) -> str:
        """What the report calls the two."""
        return f"{self.name} {self.engine}"


@dataclass(frozen=True)
class Loaded:
    """What loading took.

    Attributes:
        load_seconds: Opening engine, tokenizer and processor.
        host_before_bytes: Host memory of the process before that: Python and its libraries.
        device: The GPU's name; None where none is used.
    """

    load_seconds: float
    host_before_bytes: int
    device: str | None


class Contestant(Protocol):
    """A loaded bundle, ready to be measured."""

    @property
    def entry(self) -> Entry:
        """What it is."""

    @property
    def loaded(self) -> Loaded:
        """What loading took."""

    def run(self, request: Request) -> Sample:
        """Answers one request."""

    def device_peak(self) -> int | None:
        """Returns the most bytes of the GPU's memory so far; None where that is not known."""

    def host_peak(self) -> int:
        """Returns the most bytes of host memory so far."""

    def load(self, requests: Sequence[Request], clients: int, duration: float) -> LoadRun:
        """Serves several clients at once."""

    def scoring(self, repeats: int) -> tuple[list[float], list[float]]:
        """Runs the vision encoder with and without scoring and gather; seconds."""


class WorkerProcess:
    """A contestant in its own process, which stays open; a context manager.

    Args:
        entry: What it is.
        threads: Threads inside one operator; None: the engine's default.

    Attributes:
        entry: What it is.
        loaded: What loading took.

    Raises:
        UnavailableError: The engine or the bundle's part for it is not available here.
        InputError: The bundle cannot be opened.
        WorkerError: The process failed.
    """

    def __init__(self, entry: Entry, threads: int | None) -> None:
        self.entry = entry
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed below
        read, write = os.pipe()
        command = [sys.executable, "-c", _PROGRAM, str(write)]
        # Ctrl-C is for the process that compares: it ends this one.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(write,),
            text=True,
            env={**os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            start_new_session=True,
        )
        os.close(write)
        self._answers = os.fdopen(read, encoding="utf-8")
        # Should the machine run out of memory, the kernel ends this process first.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
        try:
            order = {"bundle": str(entry.bundle), "engine": entry.engine, "threads": threads}
            self.loaded = Loaded(**self._ask(order))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate()
        self._answers.close()
        self._errors.close()

    def run(self, request: Request) -> Sample:
        """See `Contestant.run`."""
        return Sample(**self._ask({"order": "run", "request": asdict(request)}))

    def device_peak(self) -> int | None:
        """See `Contestant.device_peak`."""
        peak: int | None = self._ask({"order": "device_memory"})["device_peak_bytes"]
        return peak

    def host_peak(self) -> int:
        """See `Contestant.host_peak`."""
        return int(self._ask({"order": "host_memory"})["host_peak_bytes"])

    def load(self, requests: Sequence[Request], clients: int, duration: float) -> LoadRun:
        """See `Contestant.load`."""
        asked = [asdict(request) for request in requests]
        return load_from_dict(self._ask({"order": "load", "requests": asked, "clients": clients, "duration": duration}))

    def scoring(self, repeats: int) -> tuple[list[float], list[float]]:
        """See `Contestant.scoring`."""
        times = self._ask({"order": "scoring", "repeats": repeats})
        return times["with"], times["without"]

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        pipe = self._process.stdin
        if pipe is None:
            raise WorkerError("the process has no input")
        try:
            pipe.write(json.dumps(order) + "\n")
            pipe.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise self._ended()
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            kinds: dict[str, type[QavpError]] = {"input": InputError, "unavailable": UnavailableError}
            raise kinds.get(result["kind"], WorkerError)(result["error"])
        return result

    def _ended(self) -> WorkerError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return WorkerError("its process was killed; most likely the machine ran out of memory")
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        how = f"with signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        last = f": {lines[-1][:_SHOWN]}" if lines else ""
        return WorkerError(f"its process ended {how}{last}")
