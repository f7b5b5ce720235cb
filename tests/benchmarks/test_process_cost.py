"""What is measured of a process, on small Python programs that take a known amount of everything."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from process_cost import FILE_PAGES_EVERY, Cost, evict, measure

MIB = 2**20
SIZE = 32 * MIB
# Waits until its memory was looked at, by way of a pipe: nothing here depends on time.
WAIT = "import os\nos.mkfifo('seen')\nopen('seen').read()\n"
# What a Python without modules takes, and what glibc keeps, is below this.
INTERPRETER = 24 * MIB


def cost_of(program: str, folder: Path, inputs: Path, limit: int | None = None) -> Cost:
    """Measures a Python program, which may end with `WAIT`."""
    (folder / "log").mkdir()
    pipe = folder / "log" / "seen"
    there: list[float] = []

    def tick(seconds: float, _resident: int) -> None:
        if pipe.exists():
            there.append(seconds)
            # The first of these samples may have been taken just before the pipe was made.
            if len(there) == 1 + FILE_PAGES_EVERY:
                pipe.write_text("go on", encoding="ascii")

    return measure([sys.executable, "-c", program], inputs=inputs, log=folder / "log", limit=limit, tick=tick)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "inputs"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(SIZE))
    return folder


MAP = (
    "import mmap, pathlib\n"
    "with open({path!r}, 'rb') as file:\n"
    "    mapped = mmap.mmap(file.fileno(), 0, access=mmap.{access})\n"
    "for start in range(0, len(mapped), 4096):\n"
    "    {touch}\n"
)


def test_memory_is_what_was_allocated(tmp_path: Path, inputs: Path) -> None:
    cost = cost_of(f"held = b'x' * {SIZE}\n{WAIT}", tmp_path, inputs)
    assert cost.exit_code == 0
    assert SIZE <= cost.peak_rss_bytes <= SIZE + INTERPRETER


def test_memory_of_children_counts(tmp_path: Path, inputs: Path) -> None:
    child = f"held = b'x' * {SIZE}\n{WAIT}"
    cost = cost_of(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])", tmp_path, inputs)
    assert SIZE <= cost.peak_rss_bytes <= SIZE + 2 * INTERPRETER


def test_mapped_pages_of_the_input_do_not_count(tmp_path: Path, inputs: Path) -> None:
    program = MAP.format(path=str(inputs / "weights"), access="ACCESS_READ", touch="mapped[start]")
    assert cost_of(program + WAIT, tmp_path, inputs).peak_rss_bytes <= INTERPRETER


def test_mapped_pages_of_other_files_count(tmp_path: Path, inputs: Path) -> None:
    program = MAP.format(path=str(inputs / "weights"), access="ACCESS_READ", touch="mapped[start]")
    other = inputs.with_name("input")  # the name of the mapped file's folder begins with it
    assert cost_of(program + WAIT, tmp_path, other).peak_rss_bytes >= SIZE


def test_changed_pages_of_the_input_count(tmp_path: Path, inputs: Path) -> None:
    program = MAP.format(path=str(inputs / "weights"), access="ACCESS_COPY", touch="mapped[start] = 1")
    assert SIZE <= cost_of(program + WAIT, tmp_path, inputs).peak_rss_bytes <= SIZE + INTERPRETER


def test_bytes_read_and_written(tmp_path: Path, inputs: Path) -> None:
    child = "open('copy', 'wb').write(open(sys.argv[1], 'rb').read())"
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {'import sys; ' + child!r}, sys.argv[1]])"
    log = tmp_path / "log"
    log.mkdir()
    evict(inputs)
    cost = measure([sys.executable, "-c", program, inputs / "weights"], inputs=inputs, log=log)
    assert (log / "copy").stat().st_size == SIZE
    # Two interpreters read their modules; all they write is the copy.
    assert SIZE <= cost.bytes_read <= SIZE + 20 * MIB
    assert SIZE <= cost.bytes_written <= SIZE + 4096


def test_a_program_over_its_limit_is_ended(tmp_path: Path, inputs: Path) -> None:
    cost = cost_of(f"import signal\nheld = b'x' * {SIZE}\nsignal.pause()", tmp_path, inputs, limit=SIZE // 2)
    assert cost.over_limit
    assert cost.exit_code == -signal.SIGKILL
    assert cost.peak_rss_bytes > SIZE // 2


def test_a_program_within_its_limit_is_not(tmp_path: Path, inputs: Path) -> None:
    cost = cost_of(f"held = b'x' * {SIZE}\n{WAIT}", tmp_path, inputs, limit=2 * SIZE)
    assert (cost.over_limit, cost.exit_code) == (False, 0)


def test_output_and_exit_code(tmp_path: Path) -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert measure([sys.executable, "-c", program], inputs=tmp_path, log=tmp_path).exit_code == 3
    assert (tmp_path / "stdout").read_text() == "out\n"
    assert (tmp_path / "stderr").read_text() == "err\n"
