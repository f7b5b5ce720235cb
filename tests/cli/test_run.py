"""`qavp-run` as a process, and what both commands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import typer
from PIL import Image

from qavp_export.cli import run
from qavp_export.cli.common import run_command
from qavp_export.errors import BundleError, ParityError, QavpError, UnavailableError
from tests.runtime.tiny_bundle import ASSISTANT, BOS, EOS, USER, WORDS, reference_answer, write_bundle

# torch looks as if it were not installed, as in production; with it, transformers would import it for seconds.
# The bundle is made by hand, and has nothing for the other engines.
REFERENCE = ("--engine", "ort-reference")
PROCESS = "import sys; sys.modules['torch'] = None; from qavp_export.cli.run import main; sys.exit(main())"


def test_an_interrupt_is_one_even_if_cleaning_up_fails(capfd: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise UnboundLocalError("a library's clean-up")

    assert run_command(app, "prog", []) == 130
    assert capfd.readouterr().err == "interrupted\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8) for seed in (0, 1)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("images")
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return [str(folder / "0.png"), str(folder / "1.png")]


def ids_of(pictures, question, new_tokens):
    prompt = [BOS, USER, *pictures, *(WORDS.index(word) for word in question.split()), ASSISTANT]
    return reference_answer(prompt, new_tokens)


def text_of(ids):
    return " ".join(WORDS[token] for token in ids if token >= 5)


def one_error_line(capsys):
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


def test_process_prints_the_answer_and_nothing_else(bundle, files, pictures):
    arguments = [str(bundle), *REFERENCE, "--image", files[0], "--prompt", "w0 w3", "--max-new-tokens", "6"]
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text_of(ids_of(pictures[:1], "w0 w3", 6)) + "\n"


def test_two_images_and_json(bundle, files, pictures, capsys):
    arguments = [str(bundle), *REFERENCE, "--prompt", "w5 w3", "--json", "--max-new-tokens", "5", "--threads", "1"]
    assert run.main([*arguments, "--image", files[0], "--image", files[1]]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    expected = ids_of(pictures, "w5 w3", 5)
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    assert result["answer"] == text_of(expected)
    assert result["token_ids"] == expected
    assert result["tokens"] == {"prompt": 9, "vision": 4, "vision_before_pruning": 8, "answer": len(expected)}
    seconds = result["seconds"]
    assert set(seconds) == {"load", "time_to_first_token", "time_per_output_token", "total"}
    steps = seconds["time_per_output_token"] * (len(expected) - 1)
    # the parts of one clock; printed with all digits
    assert seconds["time_to_first_token"] + steps == pytest.approx(seconds["total"], rel=1e-9)


def test_text_only_raw_prompt_of_one_token(bundle, capsys):
    arguments = [str(bundle), *REFERENCE, "--prompt", "w5", "--raw", "--json", "--max-new-tokens", "1"]
    assert run.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["token_ids"] == reference_answer([WORDS.index("w5")], 1)
    assert result["seconds"]["time_per_output_token"] is None


def test_sampling_flags_reach_the_model(bundle, capsys):
    def answer(*flags):
        arguments = [str(bundle), *REFERENCE, "--prompt", "w5 w3", "--max-new-tokens", "8"]
        assert run.main([*arguments, *flags]) == 0
        return capsys.readouterr().out

    hot = ["--temperature", "2", "--seed", "3"]
    assert answer(*hot) == answer(*hot) != answer()
    assert answer(*hot, "--top-k", "1") == answer(*hot, "--top-p", "1e-9") == answer()


def test_help_has_an_example(capsys):
    assert run.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "qavp-run bundle --image photo.jpg --prompt" in " ".join(out.split())
    for flag in ("--image", "--json", "--temperature", "--top-p", "--seed", "--engine", "--threads", "--debug"):
        assert flag in out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "DIR"),
        (["{bundle}"], "--prompt"),
        (["{bundle}", "--prompt", "w1", "--nonsense"], "--nonsense"),
        (["{bundle}", "--prompt", "w1", "--max-new-tokens", "many"], "valid integer"),
        (["{bundle}", "--prompt", "w1", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["{bundle}", "--prompt", "w1", "--temperature", "-1"], "temperature is -1"),
        (["{bundle}", "--prompt", "w1", "--image", "none.png"], "none.png does not exist"),
        (["{bundle}", "--prompt", "w1", "--image", "{bundle}/qavp.json"], "cannot be read"),
        (["{bundle}", "--prompt", "w1 " * 30], "has 33 tokens"),
        (["{bundle}", "--prompt", "<image>", "--raw"], "has 1 image placeholders"),
        (["{bundle}", "--prompt", "w1", "--keep", "0.25"], "keeps 0.5 of the vision tokens and no other share"),
        (["{bundle}/decoder", "--prompt", "w1"], "not a bundle"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bundle, capsys, arguments, match):
    assert run.main([*(argument.format(bundle=bundle) for argument in arguments), *REFERENCE]) == 2
    line = one_error_line(capsys)
    assert line.startswith("error: ")
    assert match in line


def test_unavailable_engine_is_exit_3(bundle, capsys):
    assert run.main([str(bundle), *REFERENCE, "--prompt", "w1", "--engine", "warp"]) == 3
    assert "'warp' does not exist; available here: ort-cpu" in one_error_line(capsys)


def test_closed_pipe_is_quiet(bundle):
    read, write = os.pipe()
    os.close(read)
    arguments = [str(bundle), *REFERENCE, "--prompt", "w0 w3"]
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, *arguments],
            stdout=pipe,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


def app_that_raises(error):
    app = typer.Typer(add_completion=False)

    @app.command()
    def command(debug: bool = typer.Option(False, "--debug")) -> None:  # noqa: ARG001
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (QavpError("a\nb"), 1, "error: a b"),
        (BundleError("x"), 2, "error: x"),
        (UnavailableError("x"), 3, "error: x"),
        (ParityError("x"), 4, "error: x"),
        (ValueError("two\nlines"), 1, "error: unexpected ValueError: two lines; --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "error: unexpected OSError: [Errno 28] No space left"),
    ],
)
def test_every_error_is_one_line_with_its_code(capsys, error, code, line):
    assert run_command(app_that_raises(error), "tool", []) == code
    assert one_error_line(capsys).startswith(line)


def test_debug_adds_the_traceback(capsys):
    assert run_command(app_that_raises(BundleError("broken")), "tool", ["--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: broken"


def test_exit_code_of_the_command_is_kept(capsys):
    assert run_command(app_that_raises(typer.Exit(7)), "tool", []) == 7
    assert capsys.readouterr().err == ""


def test_interrupt_while_generating(bundle, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.QavpModel, "generate_steps", interrupt)
    assert run.main([str(bundle), *REFERENCE, "--prompt", "w1"]) == 130
    assert one_error_line(capsys) == "interrupted"


def test_eos_is_counted_but_not_printed(bundle, tmp_path, capsys):
    picture = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = ids_of([picture], "w4 w3", 10)
    assert expected[-1] == EOS
    assert run.main([str(bundle), *REFERENCE, "--prompt", "w4 w3", "--image", str(tmp_path / "a.png"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["token_ids"] == expected
    assert result["answer"] == text_of(expected)
