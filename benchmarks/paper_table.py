"""Does the hybrid score help, and when? Answers by measuring, on one or several checkpoints.

python benchmarks/paper_table.py demo=examples/shapes_vqa/model --questions 600 --json paper_table.json --charts charts
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import typer
from paper_regimes import REGIMES
from paper_report import Subject, draw, figures, legend, pooled, print_tables
from paper_sweep import Cell, Outcome, Study, cells

from qavp_export.cli.common import run_command
from qavp_export.cli.report import ProgressBars
from qavp_export.engines import EngineOptions
from qavp_export.errors import InputError
from qavp_export.evaluate.bundles import Bundles
from qavp_export.evaluate.datasets import DataSet, load_dataset

# Data sets, and what static scales are calibrated on: of the demo another stream, of easy-VQA the training questions.
DATA: Mapping[str, str] = MappingProxyType({"demo": "demo", "easy-vqa": "easy-vqa:train"})


@dataclass(frozen=True)
class Asked:
    """One checkpoint as it is named on the command line.

    Attributes:
        name: What tables call it.
        checkpoint: Its folder.
        data: Name of the data set.
    """

    name: str
    checkpoint: Path
    data: str

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Reads `NAME=CHECKPOINT[:DATA]`.

        Raises:
            InputError: The text is not of that form, or there is no such folder.
        """
        name, equals, rest = text.partition("=")
        path, colon, data = rest.rpartition(":")
        if not colon or data not in DATA:
            path, data = rest, "demo"
        if not equals or not name or Path(name).name != name or not path:
            raise InputError(f"{text[:60]!r} is not NAME=CHECKPOINT[:DATA], DATA one of {', '.join(DATA)}")
        if not Path(path).is_dir():
            raise InputError(f"{path} is not a folder; name a checkpoint")
        return cls(name, Path(path), data)


@dataclass(frozen=True)
class Plan:
    """What is asked of every checkpoint.

    Attributes:
        questions: Questions of each cell.
        calibration: Prompts that static scales are calibrated on.
        seed: Seed of the questions, of random tokens and of intervals.
        max_new_tokens: Most tokens of an answer.
        regimes: Names in `REGIMES`.
        alphas: Weights of the semantic score; 1 and 0.5 are always among them.
        keeps: Shares of the tokens that are kept.
    """

    questions: int
    calibration: int
    seed: int
    max_new_tokens: int
    regimes: list[str]
    alphas: list[float]
    keeps: list[float]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.regimes) - set(REGIMES))
        if unknown or not self.regimes:
            raise InputError(f"--regimes {','.join(unknown)!r} does not exist; choose from {', '.join(REGIMES)}")
        if not all(0 < keep < 1 for keep in self.keeps) or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise InputError("--keeps are in (0, 1) and --alphas in [0, 1]")

    def data(self, name: str) -> tuple[DataSet, DataSet]:
        """Returns the questions, and others of the same kind to calibrate on."""
        asked = load_dataset(name, None, self.questions, self.seed)
        return asked, load_dataset(DATA[name], None, self.calibration, self.seed + 1)


class Results:
    """The report on disk, written after every cell, so that a run that was cut off goes on where it was.

    Args:
        file: The JSON file; cells in it are taken over if they were measured in the same way.
        plan: What is asked.
    """

    def __init__(self, file: Path, plan: Plan) -> None:
        if file.is_dir() or not file.parent.is_dir():
            raise InputError(f"--json {file} cannot be written; name a file in a folder that exists")
        self._file = file
        self._plan = plan
        self.report: dict[str, Any] = {**asdict(plan), "subjects": {}, "pooled": []}
        self._before: Mapping[str, Any] = {}
        if file.is_file():
            found = self._read()
            same = ("questions", "calibration", "seed", "max_new_tokens")
            if any(found.get(key) != self.report[key] for key in same):
                raise InputError(f"{file} holds figures of other settings ({', '.join(same)}); name another file")
            self._before = found["subjects"]

    def start(self, asked: Asked, study: Study, data: DataSet) -> dict[str, Any]:
        """Starts a checkpoint's section and returns the cells that are already there, by name."""
        section = {
            "checkpoint": asked.checkpoint.resolve().name,
            "data": data.name,
            "metric": data.metric,
            "tokens": study.tokens,
            "bundles": study.identity,
            "kinds": [item.kind for item in data.items],
            "cells": {},
        }
        before = self._before.get(asked.name, {})
        # Cells of regimes that are no longer asked for are measured all the same.
        known: dict[str, str] = before.get("bundles", {})
        if all(known.get(regime, bundle) == bundle for regime, bundle in study.identity.items()):
            section["cells"] = before.get("cells", {})
            section["bundles"] = known | study.identity
        self.report["subjects"][asked.name] = section
        return section["cells"]  # type: ignore[no-any-return]

    def save(self) -> None:
        """Writes the file."""
        part = self._file.with_name(f"{self._file.name}.part")
        part.write_text(json.dumps(self.report) + "\n", encoding="utf-8")
        part.replace(self._file)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--json {self._file} is there and no report of this script; name another file") from error
        if not isinstance(found, dict) or not isinstance(found.get("subjects"), dict):
            raise InputError(f"--json {self._file} is there and no report of this script; name another file")
        return found


def measure(
    asked: Asked, plan: Plan, results: Results, work: Path, options: EngineOptions, batch: int, bars: ProgressBars
) -> Subject:
    """Measures the cells of one checkpoint that are missing.

    Args:
        asked: The checkpoint.
        plan: What is asked of it.
        results: What is known, and where it is kept.
        work: Where bundles are.
        options: How graphs are opened.
        batch: Most questions at once.
        bars: Shows progress.

    Raises:
        QavpError: The checkpoint cannot be exported or asked.
    """
    data, calibration = plan.data(asked.data)
    wanted = cells(plan.regimes, plan.alphas, plan.keeps)
    outcomes: dict[Cell, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="paper-table-") as folder:
        bundles = Bundles(asked.checkpoint, asked.name, work)
        study = Study(
            bundles,
            plan.regimes,
            data,
            calibration.items,
            Path(folder),
            options=options,
            batch=batch,
            max_new_tokens=plan.max_new_tokens,
            progress=lambda stage, done, total: bars.update(f"{asked.name}: {stage}", done, total),
        )
        known = results.start(asked, study, data)
        missing = [cell for cell in wanted if cell.name not in known]
        for number, cell in enumerate(missing):
            bars.update(f"{asked.name}: cells", number, len(missing))
            outcome = study.measure(cell)
            known[cell.name] = {"scores": outcome.scores.tolist(), "scales": outcome.scales.tolist()}
            results.save()
    for cell in wanted:
        found = known[cell.name]
        outcomes[cell] = Outcome(np.array(found["scores"], np.float64), np.array(found["scales"], np.float32))
    kinds = [item.kind for item in data.items]
    return Subject(asked.name, data.name, data.metric, kinds, study.tokens, outcomes)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    checkpoints: Annotated[list[str], typer.Argument(help="NAME=CHECKPOINT[:DATA]; DATA is demo or easy-vqa.")],
    json_file: Annotated[Path, typer.Option("--json", help="Figures go here; a run that was cut off goes on.")],
    charts: Annotated[Path | None, typer.Option(help="Folder for charts of accuracy against alpha.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each cell.")] = 600,
    calibration: Annotated[int, typer.Option(min=1, help="Prompts that static scales are calibrated on.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of questions, random tokens and intervals.")] = 0,
    regimes: Annotated[str, typer.Option(help=f"Of {', '.join(REGIMES)}.")] = ",".join(REGIMES),
    alphas: Annotated[str, typer.Option(help="Weights of the semantic score.")] = "0,0.25,0.5,0.75,1",
    keeps: Annotated[str, typer.Option(help="Shares of the vision tokens that are kept.")] = "0.125,0.0625,0.25",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Most questions at once.")] = 50,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of the exported bundles.")] = Path("eval_bundles"),
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Measures alpha, the score's input and the selector in several quantization regimes; prints tables."""
    del debug  # read by run_command
    subjects = [Asked.parse(text) for text in checkpoints]
    if len({one.name for one in subjects}) < len(subjects):
        raise InputError("two checkpoints have one name; give each its own")
    plan = Plan(questions, calibration, seed, max_new_tokens, _split(regimes), _numbers(alphas), _numbers(keeps))
    results = Results(json_file, plan)
    options = EngineOptions(threads=threads)
    found = []
    with ProgressBars(enabled=True) as bars:
        for one in subjects:
            found.append(measure(one, plan, results, work, options, batch, bars))
            results.report["subjects"][one.name]["figures"] = figures(found[-1], seed)
    results.report["pooled"] = pooled(found, seed)
    results.save()
    if charts is not None:
        draw(results.report, charts)
    print_tables(results.report)
    typer.echo(legend())


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _split(text)]
    except ValueError:
        raise InputError(f"{text[:40]!r} is not a list of numbers, such as 0.125,0.25") from None


if __name__ == "__main__":
    raise SystemExit(run_command(app, "paper_table.py"))
