"""`optimum-cli export qavp`: found by Optimum, with the options of `qavp-export`."""

from __future__ import annotations

import sys

import pytest
import typer
from optimum.commands import optimum_cli

from qavp_export.cli.common import run_command
from qavp_export.cli.export import app
from qavp_export.huggingface.command import export_app
from qavp_export.manifest import Manifest
from qavp_export.verify import verify


@pytest.fixture
def optimum(monkeypatch):
    """Runs a command line of optimum-cli and returns its exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            optimum_cli.main()
        return stop.value.code

    return run


def test_export_is_that_of_the_pipeline(optimum, tiny_llava, tmp_path, capfd):
    options = ["--model", tiny_llava, "--keep", "0.4", "--recipe", "rtn"]
    assert optimum("export", "qavp", *options, tmp_path / "bundle") == 0
    manifest = Manifest.read(tmp_path / "bundle")
    assert (manifest.source, manifest.vision_tokens.after, manifest.recipe["name"]) == ("tiny-llava", 10, "rtn")
    verify(tmp_path / "bundle")
    assert f"qavp-run {tmp_path / 'bundle'}" in capfd.readouterr().out.replace("\n", "")
    assert optimum("export", "qavp", tmp_path / "bundle", *options) == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_help(optimum, capfd):
    assert optimum("export", "--help") == 0
    assert "qavp" in capfd.readouterr().out
    assert optimum("export", "qavp", "--help") == 0
    text = capfd.readouterr().out
    assert "Usage: optimum-cli export qavp [OPTIONS] [OUT]" in text
    assert "--keep" in text


def test_options_are_those_of_qavp_export():
    def options(command):
        return {(parameter.name, *parameter.opts): parameter.help for parameter in command.params}

    ours, theirs = options(typer.main.get_command(export_app())), options(typer.main.get_command(app))
    assert theirs.pop(("output", "--output", "-o"))
    assert ours.pop(("output", "output"))
    assert ours == theirs
    assert len(ours) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "x"], "No such option: --modle"),
        (["--model", "x", "a", "b"], "unexpected extra argument"),
        (["--keep", "2", "--model", "x", "out"], "keep"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_with_2(optimum, capfd, arguments, message):
    assert optimum("export", "qavp", *arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_version_is_that_of_qavp_export(optimum, capfd):
    assert optimum("export", "qavp", "--version") == 0
    version = capfd.readouterr().out
    assert run_command(app, "qavp-export", ["--version"]) == 0
    assert capfd.readouterr().out == version
