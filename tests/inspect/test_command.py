"""`qavp-inspect` as a command: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qavp_export import QavpModel
from qavp_export.cli import inspect

# torch looks as if it were not installed; matplotlib too, where a test says so.
PROCESS = "import sys; sys.modules.update({}); from qavp_export.cli.inspect import main; sys.exit(main())"
REFERENCE = ("--engine", "ort-reference", "--threads", "1")


def _run(*arguments: str | Path, matplotlib: bool = True) -> subprocess.CompletedProcess[str]:
    missing = {"torch": None} if matplotlib else {"torch": None, "matplotlib": None}
    command = [sys.executable, "-c", PROCESS.format(missing), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_picture_and_answers_without_torch(best: Path, dense: Path, picture: Path, tmp_path: Path) -> None:
    png, numbers, question = tmp_path / "out.png", tmp_path / "out.json", "what color is it ?"
    asked = ["--image", picture, "--prompt", question, "--against", dense, "--max-new-tokens", "4", *REFERENCE]
    done = _run(best, *asked, "-o", png, "--json", numbers)
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(png).width == 1500
    facts = json.loads(numbers.read_text())
    for bundle, name in ((best, "answer"), (dense, "answer_before")):
        expected = QavpModel.from_bundle(bundle, "ort-reference").generate(picture, question, max_new_tokens=4)
        assert facts[name]["answer"] == expected.strip() != ""
        assert expected.strip() in done.stdout
    # The same graph gave the picture and the answer.
    assert facts["answer"]["kept_indices"] == [facts["units"][0]["kept_indices"]]
    assert facts["answer_before"]["vision_tokens"] == 25
    assert done.stdout.startswith("7 of 25 vision tokens kept\n")


def test_numbers_alone_need_no_matplotlib(diverse: Path, picture: Path, tmp_path: Path) -> None:
    done = _run(diverse, "--image", picture, "--json", tmp_path / "out.json", matplotlib=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads((tmp_path / "out.json").read_text())["units"][0]["order"]) == 7


def test_a_picture_without_matplotlib_is_one_line(
    best: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for asked in (["--image", str(picture)], ["--graph"]):
        assert inspect.main([str(best), *asked, "-o", str(tmp_path / "out.png")]) == 3
        assert capsys.readouterr().err == (
            'error: pictures need matplotlib, which is not installed here: pip install "qavp-export[bench]"\n'
        )
        assert not (tmp_path / "out.png").exists()


def test_summary_without_torch_and_matplotlib(best: Path, tmp_path: Path) -> None:
    done = _run(best, "--json", tmp_path / "out.json", matplotlib=False)
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    for part in (
        "family llava, recipe rotate",
        "25 -> 7 per image",
        "14 at w4a4, 1 at w8a16",
        "PASS",
        "engine ort-cpu",
    ):
        assert part in words
    assert "written by qavp-export" in words
    facts, manifest = json.loads((tmp_path / "out.json").read_text()), json.loads((best / "qavp.json").read_text())
    assert facts["vision_tokens"] == {"before": 25, "after": 7}
    assert facts["decoder_linears"] == {"w4a4": 14, "w8a16": 1}
    assert facts["bundle_bytes"] == sum(entry["bytes"] for entry in manifest["files"])


def test_graph_without_torch_and_matplotlib(best: Path) -> None:
    done = _run(best, "--graph", matplotlib=False)
    assert (done.returncode, done.stderr) == (0, "")
    titles = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("nodes")]
    assert titles == ["vision_encoder", "embedding", "decoder"]
    assert "prune/score" in done.stdout


def test_graph_as_svg_and_json(best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, numbers = tmp_path / "graph.svg", tmp_path / "graph.json"
    assert inspect.main([str(best), "--graph", "-o", str(svg), "--json", str(numbers)]) == 0
    assert capsys.readouterr().out == ""
    assert svg.read_text().lstrip().startswith("<?xml")
    components = json.loads(numbers.read_text())["components"]
    assert [part["component"] for part in components] == ["vision_encoder", "embedding", "decoder"]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "qavp-inspect bundle --image photo.jpg --prompt" in " ".join(out.split())
    for flag in ("--image", "--prompt", "--against", "--output", "--graph", "--json", "--keep", "--raw", "--debug"):
        assert flag in out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "DIR"),
        (["{best}", "--image", "{picture}"], "say where to with -o FILE.png"),
        (["{best}", "--image", "none.png", "-o", "{tmp}/a.png"], "image none.png does not exist"),
        (["{best}", "--image", "{best}/qavp.json", "-o", "{tmp}/a.png"], "cannot be read"),
        (["{best}", "--image", "{picture}", "-o", "{tmp}/a.gif"], "must end in .png, .svg, .pdf"),
        (["{best}", "--image", "{picture}", "-o", "{tmp}/none/a.png"], "cannot be written (No such file or directory)"),
        (["{best}", "--image", "{picture}", "--json", "{tmp}"], "cannot be written (Is a directory)"),
        (["{best}", "--image", "{picture}", "-o", "{tmp}/a.png", "--keep", "0.5"], "keeps 0.28 of the vision tokens"),
        (["{best}", "--image", "{picture}", "-o", "{tmp}/a.png", "--threads", "0"], "threads is 0"),
        (["{best}", "--image", "{picture}", "--graph", "-o", "{tmp}/a.png"], "two pictures"),
        (["{best}", "--prompt", "what ?"], "about an image; give --image FILE"),
        (["{best}", "--image", "{picture}", "--against", "{dense}", "-o", "{tmp}/a.png"], "give --prompt TEXT"),
        (["{best}", "-o", "{tmp}/a.png"], "give --image FILE"),
        (["{dense}", "--image", "{picture}", "-o", "{tmp}/a.png"], "keeps every vision token (keep 1.0)"),
        (["{tmp}"], "is not a bundle"),
        (["{tmp}", "--graph"], "is not a bundle"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    best: Path,
    dense: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    match: str,
) -> None:
    places = {"best": best, "dense": dense, "picture": picture, "tmp": tmp_path}
    assert inspect.main([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert match in lines[0]
    assert not list(tmp_path.iterdir())


def test_an_unknown_engine_is_exit_3(
    best: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--image", str(picture), "--prompt", "what ?", "--engine", "warp", "-o", str(tmp_path / "a.png")]
    assert inspect.main([str(best), *asked]) == 3
    assert "engine 'warp' does not exist" in capsys.readouterr().err
