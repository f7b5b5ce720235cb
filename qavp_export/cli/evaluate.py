"""`qavp-eval`: compares exports of one checkpoint on the same questions, or on images without labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qavp_export.cli.common import run_command, with_options
from qavp_export.cli.evaluate_options import EvaluateOptions
from qavp_export.engines import EngineOptions
from qavp_export.errors import InputError

# Imported where they are used: they bring torch, and --help should be quick.
if TYPE_CHECKING:
    from qavp_export.engines.tensorrt.targets import EngineTargets
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
@with_options(EvaluateOptions)
def evaluate_command(options: EvaluateOptions) -> None:
    """Compare arms of one checkpoint (full precision, W4A4, pruned, random) on the same questions."""
    from qavp_export.evaluate.arms import choose_arms
    from qavp_export.evaluate.run import Setup, leave_out
    from qavp_export.evaluate.targets import engine_targets, parse_capabilities

    if options.list_arms:
        _list_arms()
        return
    if not options.model:
        raise InputError("--model is missing; see qavp-eval --help")
    chosen = choose_arms(_split(options.arms) or ([] if options.arm else ["paper"]), options.arm or [])
    checkpoints = _Checkpoints(options.model, options.revision, options.clip, options.offline, options.quiet)
    setup = Setup(
        options.recipe,
        options.keep,
        options.seed,
        options.engine,
        EngineOptions(threads=options.threads),
        options.batch,
        options.max_new_tokens,
        checkpoints.clip_name,
    )
    targets = engine_targets(
        options.engine,
        parse_capabilities(_split(options.sm)),
        options.batch,
        allow_precision_fallback=options.allow_precision_fallback,
    )
    asked = _Asked.read(options)
    _check_writable(options.json_file)
    bundles = checkpoints.open(options.work, targets)
    chosen, left_out = leave_out(bundles, chosen, setup)
    compared = _baseline(options.baseline, chosen)
    _tell(left_out)
    measured = _evaluate(bundles, chosen, setup, asked, quiet=options.quiet)
    found = {"model": checkpoints.name, **measured, "left_out": left_out}
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    from qavp_export.evaluate.tables import print_report

    print_report(found, compared)


@dataclass(frozen=True)
class _Asked:
    """What the arms are asked: questions with answers, prompts for fidelity, or both."""

    data: DataSet | None
    shown: Sequence[Item]

    @classmethod
    def read(cls, options: EvaluateOptions) -> _Asked:
        """Reads what the options name.

        Raises:
            InputError: They name nothing, or what cannot be read.
        """
        from qavp_export.evaluate.datasets import load_dataset
        from qavp_export.evaluate.fidelity import read_images
        from qavp_export.evaluate.run import with_suffix

        if options.data is not None:
            loaded = load_dataset(options.data, options.images, options.questions, options.seed)
            data = with_suffix(loaded, options.suffix)
            return cls(data, data.items if options.fidelity else ())
        if not options.fidelity or options.images is None:
            raise InputError("there is nothing to ask: give --data NAME, or --fidelity --images DIR")
        prompt = options.prompt + options.suffix
        return cls(None, read_images(options.images, prompt, options.questions, options.seed))


@dataclass(frozen=True)
class _Checkpoints:
    """The model and, where an arm reads the question, the CLIP of its tower, as the user names them."""

    model: str
    revision: str | None
    clip: str | None
    offline: bool
    quiet: bool

    @property
    def name(self) -> str:
        """The model's name without the folders that lead to it."""
        return _name(self.model)

    @property
    def clip_name(self) -> str | None:
        """CLIP's name likewise."""
        return None if self.clip is None else _name(self.clip)

    def open(self, work: Path, targets: EngineTargets | None) -> Bundles:
        """Returns where bundles of the checkpoint are; downloads what is missing."""
        from qavp_export.evaluate.bundles import Bundles

        folder = self._resolve(self.model, self.revision)
        clip = None if self.clip is None else (self._resolve(self.clip, None), _name(self.clip))
        return Bundles(folder, self.name, work, targets, clip)

    def _resolve(self, model: str, revision: str | None) -> Path:
        from qavp_export.hub import resolve_model

        return resolve_model(model, revision=revision, offline=self.offline, progress=not self.quiet).folder


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _baseline(named: str | None, arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms]
    if named is not None and named not in names:
        raise InputError(f"--baseline {named[:40]!r} is none of the arms: {', '.join(names)}")
    return named or names[0]


def _tell(left_out: Mapping[str, str]) -> None:
    """Says which arms of a group are not there, a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    for reason, members in names.items():
        typer.echo(f"left out: {', '.join(members)}: {reason}", err=True)


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

    width = max(map(len, ARMS))
    for name, arm in ARMS.items():
        fields = dict(arm.fields) | ({} if arm.pruned else {"keep": 1.0})
        settings = ", ".join(f"{key} {value}" for key, value in fields.items())
        seeds = f", {arm.seeds} seeds" if arm.seeds > 1 else ""
        typer.echo(f"{name:{width}} {arm.preset or '--recipe'}: {settings}{seeds}")
    for name, members in GROUPS.items():
        typer.echo(f"group {name}: {', '.join(members)}")
