"""Runs `worker` and waits for it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from qavp_export.engines.tensorrt.worker import PROGRESS, Report, Request
from qavp_export.errors import QavpError, UnavailableError

_WORKER = "qavp_export.engines.tensorrt.worker"


def run_worker(request: Request, work: Path, progress: Callable[[int, int], None] | None = None) -> Report:
    """Does what a request says in a new process, which ends with this call, whatever ends it.

    Args:
        request: What is to be built; its `report` is filled in here.
        work: A folder for what the processes tell each other.
        progress: Called with steps done and in all.

    Raises:
        UnavailableError: The library or a GPU is not there.
        QavpError: Nothing was built, or the process broke down.
    """
    report, asked = work / "report.json", work / "request.json"
    report.unlink(missing_ok=True)
    request = dataclasses.replace(request, report=str(report))
    asked.write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
    command = [sys.executable, "-P", "-m", _WORKER, str(asked)]
    with tempfile.TemporaryFile(dir=work) as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment())
        try:
            for line in process.stdout or ():
                if line.startswith(PROGRESS) and progress is not None:
                    done, total = line.removeprefix(PROGRESS).split()
                    progress(int(done), int(total))
            process.wait()
        finally:
            process.kill()
            process.wait()
        if not report.is_file():
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise QavpError(
                f"the process that builds engines for {request.flavour} ended with {process.returncode}"
                f" ({said[-1] if said else 'it said nothing'})"
            )
    found = Report(**json.loads(report.read_text(encoding="utf-8")))
    if found.error is not None:
        raise (UnavailableError if found.unavailable else QavpError)(found.error)
    return found


def _environment() -> dict[str, str]:
    """Returns this process's environment; the new one finds modules where this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
