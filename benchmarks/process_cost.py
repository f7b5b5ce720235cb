"""What a program costs on Linux: wall time, memory, bytes read and written, of it and of the programs it starts."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qavp_export.errors import UnavailableError

INTERVAL_S = 0.1
# Finding the input's pages walks the page tables, which holds up the page faults of the measured process.
FILE_PAGES_EVERY = 5


@dataclass(frozen=True)
class Cost:
    """What one run of a program took.

    Attributes:
        exit_code: The program's; negative: the signal that ended it.
        over_limit: Whether it was ended because it took more memory than it was allowed.
        wall_s: Seconds from start to end.
        cpu_s: Seconds of all cores together, in the program and in the kernel for it.
        peak_rss_bytes: Most resident memory seen at once, of the process and its children, without the file-backed
            pages of the input. Memory that children share is counted for each of them.
        samples: How often the memory was looked at.
        bytes_read: By read calls (`rchar`), whether from disk or the page cache, Python's own modules included. What is
            read through a mapping of the file is not in it.
        bytes_written: By write calls (`wchar`).
        disk_read_bytes: Fetched from the disk (`read_bytes`), for a mapping or not.
        disk_written_bytes: Sent to the disk, or bound to be (`write_bytes`).
    """

    exit_code: int
    over_limit: bool
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    samples: int
    bytes_read: int
    bytes_written: int
    disk_read_bytes: int
    disk_written_bytes: int


def check_supported() -> None:
    """Checks that the system tells what `measure` asks it.

    Raises:
        UnavailableError: It does not.
    """
    missing = [
        name for name in ("smaps", "io", f"task/{os.getpid()}/children") if not Path("/proc/self", name).exists()
    ]
    if missing:
        raise UnavailableError(f"/proc/self/{missing[0]} is missing; costs are measured on Linux only")


def measure(
    command: Sequence[str | Path],
    *,
    inputs: Path,
    log: Path,
    limit: int | None = None,
    environment: Mapping[str, str] | None = None,
    tick: Callable[[float, int], None] = lambda *_: None,
) -> Cost:
    """Runs a program and measures it. It is the first that the kernel ends should the machine run out of memory.

    Args:
        command: The program and its arguments.
        inputs: The folder whose mapped pages are not counted as memory.
        log: The folder that it runs in, and whose files `stdout` and `stderr` get what it prints.
        limit: Bytes of memory, counted as in `peak_rss_bytes`, beyond which the program is ended; None: no limit.
        environment: Variables to set on top of this process's own.
        tick: Called with the seconds so far and the bytes of memory now, at each sample.
    """
    variables = {**os.environ, **(environment or {})}
    peak = samples = 0
    over_limit = False
    cpu = _cpu_of_children()
    with (log / "stdout").open("wb") as out, (log / "stderr").open("wb") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=log, env=variables, start_new_session=True)
        try:
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
            sampler = Sampler(process.pid, inputs)
            pause = 0.0
            while not _has_ended(process.pid, pause):
                resident = sampler.resident()
                peak, samples = max(peak, resident), samples + 1
                over_limit = limit is not None and resident > limit
                if over_limit:
                    break
                tick(time.perf_counter() - started, resident)
                pause = INTERVAL_S
            wall = time.perf_counter() - started
            # Of a process that has ended and was not waited for yet: with what it waited for itself.
            counts = _io(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return Cost(
        exit_code=code,
        over_limit=over_limit,
        wall_s=wall,
        cpu_s=_cpu_of_children() - cpu,
        peak_rss_bytes=peak,
        samples=samples,
        bytes_read=counts["rchar"],
        bytes_written=counts["wchar"],
        disk_read_bytes=counts["read_bytes"],
        disk_written_bytes=counts["write_bytes"],
    )


class Sampler:
    """Looks at the memory of a process, its children, their children and so on.

    Args:
        pid: The process.
        inputs: The folder whose files' unchanged pages do not count.
    """

    def __init__(self, pid: int, inputs: Path) -> None:
        self._pid = pid
        header = rb"^[0-9a-f]+-[0-9a-f]+ [^\n]* %s/[^\n]*\n(.*?)^VmFlags:" % re.escape(os.fsencode(inputs.resolve()))
        self._of_inputs = re.compile(header, re.MULTILINE | re.DOTALL)
        # Of each process: samples of it so far, and file-backed and shared pages at the last look.
        self._seen: dict[int, tuple[int, int]] = {}

    def resident(self) -> int:
        """Returns the bytes in memory; file-backed pages as of at most `FILE_PAGES_EVERY` samples ago."""
        total = 0
        for pid in process_tree(self._pid):
            # A process may end at any time: its memory is gone then.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                samples, others = self._seen.get(pid, (0, 0))
                if samples % FILE_PAGES_EVERY == 0:
                    others = self._other_pages(pid)
                self._seen[pid] = samples + 1, others
                total += others + _total(b"RssAnon", Path(f"/proc/{pid}/status").read_bytes())
        return total

    def _other_pages(self, pid: int) -> int:
        """Returns the bytes that are neither anonymous nor of the input.

        A page of a private mapping that was written to is anonymous: a copy, which takes memory of its own.
        """
        text = Path(f"/proc/{pid}/smaps").read_bytes()
        of_inputs = b"".join(self._of_inputs.findall(text))
        return _file_backed(text) - _file_backed(of_inputs)


def process_tree(pid: int) -> Iterator[int]:
    """Yields the ids of a process, its children, their children and so on, as far as they live."""
    yield pid
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (thread / "children").read_text(encoding="ascii").split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            yield from process_tree(int(child))


def evict(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that whoever reads them next reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not written yet cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _has_ended(pid: int, patience: float) -> bool:
    """Waits until a child has ended, at most `patience` seconds, and leaves it to be waited for."""
    handle = os.pidfd_open(pid)
    try:
        return bool(select.select([handle], [], [], patience)[0])
    finally:
        os.close(handle)


def _file_backed(smaps: bytes) -> int:
    return _total(b"Rss", smaps) - _total(b"Anonymous", smaps)


def _total(field: bytes, text: bytes) -> int:
    return 1024 * sum(map(int, re.findall(rb"^%s:\s+(\d+) kB" % field, text, re.MULTILINE)))


def _cpu_of_children() -> float:
    """Returns the seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _io(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    return {name: int(count) for name, _, count in (line.partition(":") for line in lines)}
