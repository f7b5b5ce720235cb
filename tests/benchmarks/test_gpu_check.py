"""What gpu_check.py does without a GPU: it says so, compiles, and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_engines
import pytest
from gpu_compile import Binary, compile_all, read_binaries, spec_key, write_binaries
from gpu_engines import EngineResults
from gpu_kernels import kernel_specs
from gpu_matmul import matmul_specs
from gpu_report import Check, Report, Timing, print_report
from rich.console import Console

from qavp_export.engines.kernels.score import mix_token_score_spec
from qavp_export.errors import UnavailableError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
SPEC = mix_token_score_spec(48, 0.25)


def test_without_a_driver(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--json", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        pytest.skip("there is a GPU here")
    assert result.returncode == 3
    assert "CUDA driver" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not target.exists()


@pytest.mark.parametrize(
    ("ratio", "goal", "at_most", "met"),
    [
        (1.5, 1.5, False, True),
        (1.4, 1.5, False, False),
        (5, 6, True, True),
        (7, 6, True, False),
        (2, None, False, None),
    ],
)
def test_a_goal_is_met_or_missed(ratio: float, goal: float | None, at_most: bool, met: bool | None) -> None:
    assert Timing("kernel", "sizes", 1.0, "words", ratio, goal, at_most).met is met


def test_the_table_comes_last_and_wrong_results_fail(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("kernel", "small", True, "0 differ"), Check("kernel", "large", False, "7 differ")]
    timings = [Timing("kernel", "large", 1234.5, "times faster", 1.25, 1.5)]
    report = Report({"name": "a GPU"}, checks, timings, {"tensorrt on bundle": "not installed"})
    assert not report.passed
    assert Report(report.device, checks[:1], timings, {}).passed
    print_report(report, Console(width=150))
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[:3] == [
        "WRONG  kernel, large: 7 differ",
        "1 of 2 checks passed",
        "not measured: tensorrt on bundle: not installed",
    ]
    assert lines[-1].split() == ["kernel", "large", "1.23", "ms", "times", "faster", "1.25", ">=", "1.5", "missed"]
    assert report.to_dict()["timings"][0]["met"] is False


def test_a_specification_is_the_same_text_in_every_process() -> None:
    code = (
        "from gpu_compile import spec_key\n"
        "from qavp_export.engines.kernels.score import mix_token_score_spec\n"
        "print(spec_key(mix_token_score_spec(48, 0.25)))"
    )
    for seed in ("1", "2", "3"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPT.parent)}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == spec_key(SPEC)


def test_compiled_kernels_travel(tmp_path: Path) -> None:
    (binary,) = compile_all([SPEC], 90)
    assert binary.compiled.capability == 90
    assert binary.cubin.startswith(b"\x7fELF")
    assert binary.registers > 0
    file = tmp_path / "kernels.json.gz"
    write_binaries(file, [SPEC], [binary])
    assert read_binaries(file) == {spec_key(SPEC): binary}
    assert isinstance(read_binaries(file)[spec_key(SPEC)], Binary)


def test_tuning_times_more_kernels() -> None:
    for specs in (kernel_specs, lambda *, tune: matmul_specs(90, tune=tune)):
        default, tuned = ({spec_key(spec) for spec in specs(tune=tune)} for tune in (False, True))
        assert default < tuned


def test_engines_are_compared_with_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str]) -> tuple[dict[str, Any], dict[str, int]]:
        task = json.loads(command[-1])
        if task["engine"].startswith("tensorrt"):
            raise UnavailableError(f"no {task['engine']} here")
        if command[1].endswith("gpu_answers.py"):
            answers = ["red" for _ in task["items"]]
            # 2 of 72 is within what rounding may do.
            wrong = 2 if task["engine"] == "ort-cuda" else 0
            return {"answers": ["blue"] * wrong + answers[wrong:]}, {}
        timings = {stage: [2e-3, 1e-3, 3e-3] for stage in ("vision", "prefill", "ttft", "tpot")}
        return {"timings": timings, "details": {"prompt_tokens": 96}}, {}

    monkeypatch.setattr(gpu_engines, "run", run)
    results = EngineResults()
    results.measure(tmp_path / "demo", answers=True)
    (check,) = results.checks
    assert (check.name, check.passed, check.detail) == ("ort-cuda", True, "97% of 72 answers are ort-cpu's")
    assert [(timing.name, timing.microseconds) for timing in results.timings] == [
        (f"ort-cuda {stage}", 2000.0) for stage in ("vision", "prefill", "ttft", "tpot")
    ]
    assert results.missing == {f"{name} on demo": f"no {name} here" for name in ("tensorrt", "tensorrt-rtx")}


def test_engines_are_loaded_without_our_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text('#!/bin/sh\ncase "$1" in *decoder*) echo "no such plugin" >&2; exit 1;; esac\n', encoding="ascii")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = tmp_path / "bundle" / "engines" / "tensorrt"
    folder.mkdir(parents=True)
    for name in ("decoder", "embedding"):
        (folder / f"{name}.engine").touch()
    found = gpu_engines._load_alone("tensorrt", tmp_path / "bundle")
    assert [(check.case, check.passed) for check in found] == [("decoder.engine", False), ("embedding.engine", True)]
    assert found[0].detail == "no such plugin"
    assert gpu_engines._load_alone("ort-cuda", tmp_path / "bundle") == []
