"""`qavp-export --dry-run` about engines: it refuses what an export refuses, and says what would be built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qavp_export.cli.common import run_command
from qavp_export.cli.export import app
from qavp_export.engines.tensorrt import build
from qavp_export.engines.tensorrt.worker import Report, Request
from qavp_export.errors import UnavailableError

HOPPER = Report("11.4.0.106", capability=90, driver=13000)
RTX = Report("1.7.1.9")


class Libraries:
    """Stands for the process that asks a library what it is."""

    def __init__(self, **reports: Report) -> None:
        self.reports = {name.replace("_", "-"): report for name, report in reports.items()}
        self.asked: list[str] = []

    def __call__(self, request: Request, _: Path) -> Report:
        assert request.model is None
        self.asked.append(request.flavour)
        if request.flavour not in self.reports:
            raise UnavailableError(f"engine '{request.flavour}' is not available here: it is not installed")
        return self.reports[request.flavour]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Libraries]:
    def install(**reports: Report) -> Libraries:
        found = Libraries(**reports)
        monkeypatch.setattr(build, "run_worker", found)
        return found

    return install


def _run(*argv: str) -> int:
    return run_command(app, "qavp-export", list(argv))


@pytest.mark.parametrize(
    ("flags", "installed", "code", "message"),
    [
        (["--engine", "tensorrt"], {}, 3, "'tensorrt' is not available here"),
        (["--engine", "tensorrt"], {"tensorrt": Report("10.12.0.36", 90)}, 3, "10.12.0.36 is older than 10.13"),
        (["--engine", "tensorrt", "--format", "nvfp4"], {"tensorrt": HOPPER}, 3, "nvfp4 needs a GPU of compute"),
        (["--engine", "tensorrt-rtx", "--sm", "89", "--recipe", "nvfp4"], {"tensorrt_rtx": RTX}, 3, "nvfp4 needs"),
        (["--engine", "tensorrt", "--max-tokens", "129"], {"tensorrt": HOPPER}, 2, "--max-tokens is 129"),
        (["--engine", "tensorrt-rtx"], {"tensorrt_rtx": RTX}, 2, "--sm goes with --engine tensorrt-rtx"),
    ],
)
def test_what_an_export_refuses_is_refused(
    flags: list[str],
    installed: dict[str, Report],
    code: int,
    message: str,
    tiny_llava: Path,
    tmp_path: Path,
    libraries: Callable[..., Libraries],
    capfd: pytest.CaptureFixture[str],
) -> None:
    libraries(**installed)
    target = tmp_path / "bundle"
    said = []
    for dry in (["--dry-run"], []):
        assert _run("--model", str(tiny_llava), "-o", str(target), "--json", *flags, *dry) == code
        captured = capfd.readouterr()
        assert captured.out == ""
        said.append(captured.err)
    assert said[0] == said[1]
    assert message in said[0]
    assert list(tmp_path.iterdir()) == []


def test_the_engines_that_would_be_built_are_named(
    tiny_llava: Path, libraries: Callable[..., Libraries], capfd: pytest.CaptureFixture[str]
) -> None:
    found = libraries(tensorrt=HOPPER, tensorrt_rtx=RTX)
    flags = ["--model", str(tiny_llava), "--dry-run", "--engine", "ort-cpu,tensorrt,tensorrt-rtx", "--sm", "120,89"]
    assert _run(*flags, "--json") == 0
    assert json.loads(capfd.readouterr().out)["engines"] == {
        "tensorrt": {"version": "11.4.0.106", "capabilities": [90]},
        "tensorrt-rtx": {"version": "1.7.1.9", "capabilities": [89, 120]},
    }
    assert found.asked == ["tensorrt", "tensorrt-rtx"]
    assert _run(*flags) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "engine tensorrt to be built by version 11.4.0.106 for compute capability 9.0;" in out
    assert "engine tensorrt-rtx to be built by version 1.7.1.9 for compute capability 8.9, 12.0;" in out


def test_without_engines_no_library_is_asked(
    tiny_llava: Path, libraries: Callable[..., Libraries], capfd: pytest.CaptureFixture[str]
) -> None:
    found = libraries(tensorrt=HOPPER)
    assert _run("--model", str(tiny_llava), "--dry-run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["engines"] == {}
    assert found.asked == []
