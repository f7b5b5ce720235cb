"""A program that answers with JSON, run on its own and its memory watched."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cost_report import NO_MEMORY
from latency_probe import resident

from qavp_export.errors import QavpError, UnavailableError

# Looking at a process's memory this often takes none of its time that could be noticed.
_INTERVAL_S = 0.1
_SHOWN = 300


class ContestantError(QavpError):
    """A contestant's process failed."""


def run(command: Sequence[str | Path]) -> tuple[dict[str, Any], dict[str, int]]:
    """Runs a program to its end. It is the first that the kernel ends should the machine run out of memory.

    Args:
        command: The program and its arguments; the last line that it prints must be a JSON object.

    Returns:
        What it printed, and `peak_rss_bytes` and `peak_anonymous_bytes`, the most memory seen at once.

    Raises:
        ContestantError: It failed; the message has the last line of its errors.
        UnavailableError: The machine ran out of memory.
    """
    peak = {"peak_rss_bytes": 0, "peak_anonymous_bytes": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=_INTERVAL_S)
                    break
                memory = resident(process.pid)
                peak["peak_rss_bytes"] = max(peak["peak_rss_bytes"], memory["peak"])
                peak["peak_anonymous_bytes"] = max(peak["peak_anonymous_bytes"], memory["anonymous"])
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _error(process.returncode, errors)
    answer: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return answer, peak


def _error(code: int, errors: str) -> QavpError:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1][:_SHOWN] if lines else f"ended with exit code {code} and no message"
    if code == -signal.SIGKILL or NO_MEMORY.search(last):
        return UnavailableError(f"the machine ran out of memory: {last}")
    return ContestantError(last)
