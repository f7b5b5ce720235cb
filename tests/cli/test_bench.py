"""`qavp-bench` from its arguments to its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qavp_export.bench.contestant import WorkerError, WorkerProcess
from qavp_export.bench.summary import METRICS, STAGES
from qavp_export.cli import bench
from tests.runtime.tiny_bundle import write_bundle

QUICK = ("--tokens", "2", "--repeats", "2", "--warmup", "1", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_two_bundles_and_files(bundle: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_bundle(tmp_path / "other", positions="original")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
    arguments = [str(bundle), str(other), "--engines", "ort-reference,tensorrt", "--image", str(image)]
    arguments += ["--prompt", "w1", "--json", str(files["json"]), "--csv", str(files["csv"])]
    assert bench.main([*arguments, "--report", str(files["html"]), "--load", "2", "--duration", "0.01", *QUICK]) == 0
    found = json.loads(files["json"].read_text())
    assert [contestant["label"] for contestant in found["contestants"]] == [
        "bundle ort-reference",
        "other ort-reference",
    ]
    for contestant in found["contestants"]:
        assert set(contestant["stages"]) == set(STAGES)
        assert set(contestant["metrics"]) == set(METRICS)
        assert contestant["metrics"]["end_to_end"]["samples"] == 2
        assert set(contestant["ratios"]["end_to_end"]) == {"estimate", "low", "high"}
        assert contestant["load_test"]["requests"] >= 2
    assert [missing["engine"] for missing in found["unavailable"]] == ["tensorrt", "tensorrt"]
    assert "has no engine for tensorrt" in found["unavailable"][0]["reason"]
    assert {line["engine"] for line in csv.DictReader(files["csv"].open())} == {"ort-reference", "tensorrt"}
    assert "bundle tensorrt" in files["html"].read_text()
    assert (tmp_path / "out-stages.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "time to first token" in out
    assert f"written: {files['html']}" in out


def test_a_sweep_exports_what_is_missing(
    tiny_llava: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"image": image.name, "question": "what is the color ?", "answer": "red"}) + "\n")
    (tmp_path / image.name).write_bytes(image.read_bytes())
    work = tmp_path / "work"
    arguments = ["--model", str(tiny_llava), "--sweep", "keep=0.2,1.0", "--recipe", "rtn", "--work", str(work)]
    arguments += ["--engines", "ort-cpu", "--image", str(image), "--prompt", "what is", *QUICK]
    first = [*arguments, "--data", f"jsonl:{questions}", "--report", str(tmp_path / "out.html")]
    assert bench.main([*first, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    names = [(contestant["name"], contestant["vision_tokens"]["after"]) for contestant in found["contestants"]]
    assert names == [("rtn, keep 1", 25), ("rtn, keep 0.2", 5)]
    assert all(contestant["accuracy"]["source"].endswith("1 questions, ort-cpu") for contestant in found["contestants"])
    dense, pruned = (contestant["stages"]["scoring_and_gather"] for contestant in found["contestants"])
    assert (dense["p50"], dense["reason"]) == (None, "all tokens are kept: none is scored")
    assert pruned["samples"] >= 2
    for key in ("stages", "latency-keep", "accuracy-latency", "accuracy-keep"):
        assert (tmp_path / f"out-{key}.png").is_file()
    written = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    assert bench.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == written
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "ort-gpu"], "--engines 'ort-gpu' does not exist"),
        (["--engines", ","], "does not exist"),
        (["--image", "no.png"], "--image no.png is not a file"),
        (["--report", "report.pdf"], "its name ends in .html"),
        (["--json", "no/such/folder.json"], "its folder does not exist"),
        (["--sweep", "keep=0.5"], "--sweep and --model go together"),
        (["--model", "m", "--sweep", "alpha=1"], "is not keep=RATIO"),
        (["--accuracy", "a.json", "--data", "demo"], "give one"),
        (["--data", "no-data"], "data set 'no-data' does not exist"),
        (["--repeats", "1"], "--repeats 2 or more"),
        (["--tokens", "0"], "--tokens 1 or more"),
        (["no-bundle"], "no-bundle is not a bundle"),
    ],
)
def test_bad_input_is_one_line(
    bundle: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.main([str(bundle), *arguments]) == 2
    assert message in error_line(capsys)


def test_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert "there is nothing to compare" in error_line(capsys)


def test_without_any_engine_it_exits_with_3_and_says_why(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(bundle), "--engines", "tensorrt", *QUICK]) == 3
    assert "has no engine for tensorrt" in error_line(capsys)


def test_one_that_breaks_is_reported_after_the_others_are_written(
    bundle: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_bundle(tmp_path / "broken")
    run = WorkerProcess.run

    def run_or_break(self, request):
        if self.entry.name == "broken":
            # As the kernel does when memory runs out.
            self._process.kill()
        return run(self, request)

    monkeypatch.setattr(WorkerProcess, "run", run_or_break)
    path = tmp_path / "out.json"
    arguments = [str(bundle), str(broken), "--engines", "ort-reference", "--image", str(image), "--prompt", "w1"]
    assert bench.main([*arguments, "--json", str(path), *QUICK]) == WorkerError.exit_code == 1
    assert "broken ort-reference failed: its process was killed" in error_line(capsys)
    found = json.loads(path.read_text())
    assert [contestant["name"] for contestant in found["contestants"]] == ["bundle"]
    assert [(missing["label"], missing["failed"]) for missing in found["unavailable"]] == [
        ("broken ort-reference", True)
    ]
