"""`qavp-eval` from its arguments to its table, on a tiny random checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qavp_export import pipeline
from qavp_export.cli import evaluate
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import UnavailableError
from qavp_export.evaluate import arms, targets
from qavp_export.manifest import Manifest
from tests.models.clip import make_clip

ARMS = ("--arms", "full,w4a4+hybrid", "--recipe", "rtn", "--keep", "0.2", "--quiet", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        record = {"image": f"{number}.png", "question": "what is the color", "answer": "red", "type": "ab"[number % 2]}
        lines.append(json.dumps(record))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_a_report_and_what_is_used_again(tiny_llava: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny_llava), *ARMS, "--work", str(folder / "work"), "--json", str(folder / "r.json")]
    assert evaluate.main([*arguments, "--data", f"jsonl:{folder / 'questions.jsonl'}", "--fidelity"]) == 0
    out = capsys.readouterr().out
    report = json.loads((folder / "r.json").read_text())
    assert report["data"] == {"name": "questions.jsonl", "questions": 4, "metric": "exact"}
    assert list(report["arms"]) == ["full", "w4a4+hybrid"]
    assert report["arms"]["w4a4+hybrid"]["vision_tokens"] == {"before": 25, "after": 5}
    assert list(report["arms"]["full"]["by_type"]) == ["a", "b"]
    assert report["fidelity"] == {"prompts": 4, "reference": "full"}
    assert set(report["arms"]["w4a4+hybrid"]["fidelity"]) >= {"kl", "top1_agreement"}
    assert (report["model"], report["keep"], report["engine"]) == ("tiny-llava", 0.2, "ort-cpu")
    for text in ("questions.jsonl: accuracy in % (exact), 4 questions", "w4a4+hybrid", "less full", "KL"):
        assert text in out
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*/qavp.json")}
    assert len(stamps) == 2
    again = [*arguments, "--fidelity", "--images", str(folder), "--prompt", "what is the color", "--questions", "3"]
    assert evaluate.main(again) == 0
    assert "accuracy" not in capsys.readouterr().out
    report = json.loads((folder / "r.json").read_text())
    assert (report["data"], report["comparisons"], report["fidelity"]["prompts"]) == (None, [], 3)
    assert {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*/qavp.json")} == stamps


def test_the_question_is_an_arms_and_what_a_group_lacks_is_left_out(
    tiny_llava: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(tmp_path / "tiny-clip", tiny_llava)
    monkeypatch.setattr(arms, "GROUPS", {"few": ("full", "w4a4+text", "w4a4+dpp-text")})
    asked = ["--data", f"jsonl:{folder / 'questions.jsonl'}", "--max-new-tokens", "2", "--recipe", "rtn", "--quiet"]
    given = ["--model", str(tiny_llava), "--keep", "0.2", *asked]
    capsys.readouterr()
    # The other arms go on.
    report = tmp_path / "r.json"
    assert evaluate.main([*given, "--arms", "few", "--work", str(folder / "work"), "--json", str(report)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("left out: w4a4+text, w4a4+dpp-text: semantic 'text' needs CLIP's text tower")
    found = json.loads(report.read_text())
    assert (list(found["arms"]), list(found["left_out"]), found["clip"]) == (
        ["full"],
        ["w4a4+text", "w4a4+dpp-text"],
        None,
    )
    work = tmp_path / "work"
    assert evaluate.main([*given, "--arms", "w4a4+text", "--work", str(work)]) == 2
    assert "arm w4a4+text: semantic 'text' needs CLIP's text tower" in one_error_line(capsys)
    assert evaluate.main([*given, "--arms", "w4a4+cls", "--clip", str(clip), "--work", str(work)]) == 2
    assert "--clip is read by no arm" in one_error_line(capsys)
    assert evaluate.main([*given, "--arms", "w4a4+text", "--clip", str(tiny_llava), "--work", str(work)]) == 2
    assert "holds no CLIP model" in one_error_line(capsys)
    assert not work.exists()
    arguments = [*given, "--arms", "w4a4+text", "--clip", str(clip), "--fidelity", "--json", str(report)]
    assert evaluate.main([*arguments, "--work", str(folder / "work")]) == 0
    found = json.loads(report.read_text())
    assert (found["clip"], found["left_out"]) == ("tiny-clip", {})
    assert found["arms"]["w4a4+text"]["recipe"]["semantic"] == "text"
    assert found["arms"]["w4a4+text"]["vision_tokens"] == {"before": 25, "after": 5}
    assert found["arms"]["w4a4+text"]["fidelity"]["kl"] > 0
    (bundle,) = found["arms"]["w4a4+text"]["bundles"]
    question = Manifest.read(folder / "work" / bundle).vision_tokens.question
    assert question is not None
    assert question.source == "tiny-clip"


def test_engines_are_built_with_the_bundles(
    tiny_llava: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: object, targets: EngineTargets, **__: object) -> None:
        built.append(targets)
        raise UnavailableError("so far")

    built: list[EngineTargets] = []
    monkeypatch.setattr(pipeline, "export", export)
    monkeypatch.setattr(targets, "import_library", lambda _: None)
    monkeypatch.setattr(targets.Device, "open", lambda: SimpleNamespace(capability=(8, 9)))
    given = ["--model", str(tiny_llava), *ARMS, "--data", f"jsonl:{folder / 'questions.jsonl'}", "--batch", "3"]
    given += ["--work", str(tmp_path / "work")]
    assert evaluate.main([*given, "--engine", "tensorrt-rtx", "--sm", "80,89", "--allow-precision-fallback"]) == 3
    assert one_error_line(capsys) == "error: so far"
    assert built == [EngineTargets(("tensorrt-rtx",), (80, 89), max_batch=3, allow_precision_fallback=True)]

    def none() -> None:
        raise UnavailableError("there is no CUDA driver")

    monkeypatch.setattr(targets.Device, "open", none)
    assert evaluate.main([*given, "--engine", "tensorrt"]) == 3
    assert one_error_line(capsys) == "error: engine 'tensorrt' is not available here: there is no CUDA driver"
    assert len(built) == 1


def test_arms_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--list-arms"]) == 0
    out = capsys.readouterr().out
    assert "group paper: full, w4a4, full+semantic" in out
    assert "w4a4+maxmin" in out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "qavp-eval --model examples/shapes_vqa/model --data demo" in out
    for flag in ("--arms", "--fidelity", "--images", "--json", "--work", "--baseline", "--clip", "--sm"):
        assert flag in out


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        ([], 2, "--model is missing"),
        (["--model", "{model}"], 2, "nothing to ask"),
        (["--model", "{model}", "--fidelity"], 2, "nothing to ask"),
        (["--model", "{model}", "--data", "other"], 2, "data set 'other' does not exist"),
        (["--model", "{model}", "--data", "demo", "--arms", "best"], 2, "arm 'best' does not exist"),
        (["--model", "{model}", "--data", "demo", "--baseline", "w4a4+dpp"], 2, "--baseline 'w4a4+dpp'"),
        (["--model", "{model}", "--data", "demo", "--arm", "x"], 2, "--arm 'x' is not"),
        (["--model", "{model}", "--data", "demo", "--batch", "0"], 2, "--batch"),
        (["--model", "{model}", "--data", "demo", "--keep", "2"], 2, "keep"),
        (["--model", "{model}", "--data", "demo", "--json", "none/r.json"], 2, "--json none/r.json"),
        (["--model", "{model}", "--data", "demo", "--engine", "cpu"], 2, "--engine 'cpu' does not exist"),
        (["--model", "{model}", "--data", "demo", "--sm", "89"], 2, "--sm goes with --engine tensorrt-rtx"),
        (["--model", "{folder}", "--data", "demo"], 2, "config.json"),
        (["--model", "{model}", "--data", "demo", "--questions", "many"], 2, "valid integer"),
    ],
)
def test_bad_input_is_one_line(
    tiny_llava: Path, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, match: str
) -> None:
    filled = [argument.format(model=tiny_llava, folder=folder) for argument in arguments]
    assert evaluate.main([*filled, "--quiet", "--work", str(folder / "none")]) == code
    line = one_error_line(capsys)
    assert line.startswith("error: ")
    assert match in line
    assert not (folder / "none").exists()


def test_a_missing_package_is_exit_3(
    tiny_llava: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    assert evaluate.main(["--model", str(tiny_llava), "--data", "easy-vqa"]) == 3
    assert "pip install easy-vqa" in one_error_line(capsys)
