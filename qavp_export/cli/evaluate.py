"""`qavp-eval`: compares exports of one checkpoint on the same questions, or on images without labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qavp_export.cli.common import run_command
from qavp_export.cli.evaluate_options import (
    ArmOption,
    ArmsOption,
    BaselineOption,
    BatchOption,
    DataOption,
    DebugOption,
    EngineOption,
    FidelityOption,
    ImagesOption,
    JsonOption,
    KeepOption,
    ListArmsOption,
    MaxNewTokensOption,
    ModelOption,
    OfflineOption,
    PromptOption,
    QuestionsOption,
    QuietOption,
    RecipeOption,
    RevisionOption,
    SeedOption,
    SuffixOption,
    ThreadsOption,
    WorkOption,
)
from qavp_export.engines import EngineOptions
from qavp_export.errors import InputError

# Imported where they are used: they bring torch, and --help should be quick.
if TYPE_CHECKING:
    from qavp_export.evaluate.arms import Arm
    from qavp_export.evaluate.bundles import Bundles
    from qavp_export.evaluate.datasets import DataSet, Item
    from qavp_export.evaluate.run import Setup

_EPILOG = (
    "Examples: qavp-eval --model examples/shapes_vqa/model --data demo --questions 240; "
    "qavp-eval --model llava-1.5-7b --data textvqa:TextVQA_0.5.1_val.json --questions 500 --json report.json; "
    "qavp-eval --model llava-1.5-7b --fidelity --images photos --arms w4a4,w4a4+hybrid,w4a4+dpp"
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `qavp-eval`; returns the exit code."""
    return run_command(app, "qavp-eval", argv)


@app.command(epilog=_EPILOG)
def evaluate_command(
    model: ModelOption = "",
    data: DataOption = None,
    arms: ArmsOption = None,
    arm: ArmOption = None,
    list_arms: ListArmsOption = False,
    baseline: BaselineOption = None,
    keep: KeepOption = 0.125,
    recipe: RecipeOption = "rotate",
    questions: QuestionsOption = None,
    seed: SeedOption = 0,
    fidelity: FidelityOption = False,
    images: ImagesOption = None,
    prompt: PromptOption = "Describe the image.",
    suffix: SuffixOption = "",
    max_new_tokens: MaxNewTokensOption = 16,
    batch: BatchOption = 20,
    engine: EngineOption = "ort-cpu",
    threads: ThreadsOption = None,
    work: WorkOption = Path("eval_bundles"),
    json_file: JsonOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare arms of one checkpoint (full precision, W4A4, pruned, random) on the same questions."""
    del debug  # read by run_command
    from qavp_export.evaluate.arms import choose_arms
    from qavp_export.evaluate.run import Setup

    if list_arms:
        _list_arms()
        return
    if not model:
        raise InputError("--model is missing; see qavp-eval --help")
    chosen = choose_arms(_split(arms) or ([] if arm else ["paper"]), arm or [])
    compared = baseline or chosen[0].name
    if compared not in [one.name for one in chosen]:
        raise InputError(f"--baseline {compared[:40]!r} is none of the arms: {', '.join(one.name for one in chosen)}")
    asked = _Asked.read(data, fidelity, images, prompt, suffix, questions, seed)
    setup = Setup(recipe, keep, seed, engine, EngineOptions(threads=threads), batch, max_new_tokens)
    _check_writable(json_file)
    bundles, name = _open(model, revision, work, setup, offline=offline, quiet=quiet)
    found = {"model": name, **_evaluate(bundles, chosen, setup, asked, quiet=quiet)}
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    from qavp_export.evaluate.tables import print_report

    print_report(found, compared)


@dataclass(frozen=True)
class _Asked:
    """What the arms are asked: questions with answers, prompts for fidelity, or both."""

    data: DataSet | None
    shown: Sequence[Item]

    @classmethod
    def read(
        cls,
        spec: str | None,
        fidelity: bool,
        images: Path | None,
        prompt: str,
        suffix: str,
        questions: int | None,
        seed: int,
    ) -> _Asked:
        from qavp_export.evaluate.datasets import load_dataset
        from qavp_export.evaluate.fidelity import read_images
        from qavp_export.evaluate.run import with_suffix

        if spec is not None:
            data = with_suffix(load_dataset(spec, images, questions, seed), suffix)
            return cls(data, data.items if fidelity else ())
        if not fidelity or images is None:
            raise InputError("there is nothing to ask: give --data NAME, or --fidelity --images DIR")
        return cls(None, read_images(images, prompt + suffix, questions, seed))


def _open(
    model: str, revision: str | None, work: Path, setup: Setup, *, offline: bool, quiet: bool
) -> tuple[Bundles, str]:
    """Returns where bundles of the checkpoint are, and the model's name without the folders that lead to it."""
    from qavp_export.evaluate.bundles import Bundles
    from qavp_export.evaluate.run import engine_targets
    from qavp_export.hub import resolve_model

    folder = resolve_model(model, revision=revision, offline=offline, progress=not quiet).folder
    name = Path(model).resolve().name if Path(model).exists() else model
    return Bundles(folder, name, work, engine_targets(setup)), name


def _evaluate(bundles: Bundles, arms: Sequence[Arm], setup: Setup, asked: _Asked, *, quiet: bool) -> dict[str, Any]:
    from qavp_export.cli.report import ProgressBars
    from qavp_export.evaluate.run import Evaluation, report

    with ProgressBars(enabled=not quiet) as bars:
        evaluation = Evaluation(bundles, arms, setup, bars.update)
        evaluation.export(reference=bool(asked.shown))
        accuracy = {} if asked.data is None else evaluation.accuracy(asked.data)
        fidelity = evaluation.fidelity(asked.shown) if asked.shown else {}
    return report(accuracy, fidelity, asked.data, len(asked.shown), setup)


def _check_writable(file: Path | None) -> None:
    # Before the hours that an evaluation may take.
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise InputError(f"--json {file} cannot be written; name a file in a folder that exists")


def _split(options: list[str] | None) -> list[str]:
    return [part.strip() for option in options or [] for part in option.split(",") if part.strip()]


def _list_arms() -> None:
    from qavp_export.evaluate.arms import ARMS, GROUPS

    for name, arm in ARMS.items():
        fields = dict(arm.fields) | ({} if arm.pruned else {"keep": 1.0})
        settings = ", ".join(f"{key} {value}" for key, value in fields.items())
        seeds = f", {arm.seeds} seeds" if arm.seeds > 1 else ""
        typer.echo(f"{name:18} {arm.preset or '--recipe'}: {settings}{seeds}")
    for name, members in GROUPS.items():
        typer.echo(f"group {name}: {', '.join(members)}")
