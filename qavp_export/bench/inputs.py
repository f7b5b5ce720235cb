"""What a comparison is made of: inputs, bundles, accuracy, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qavp_export.bench.accuracy import Accuracy, measure_accuracy, read_accuracy
from qavp_export.bench.comparison import Comparison, Progress
from qavp_export.bench.contestant import Entry
from qavp_export.bench.page import check_report, write_report
from qavp_export.bench.request import Request
from qavp_export.bench.sweep import export_sweep, parse_sweep, sweep_targets
from qavp_export.bench.tables import to_csv
from qavp_export.calibration.data import DEFAULT_PROMPT, demo_calibration
from qavp_export.engines import ENGINES
from qavp_export.errors import InputError, QavpError, UnavailableError
from qavp_export.evaluate.datasets import DataSet
from qavp_export.hub import resolve_model
from qavp_export.manifest import Manifest
from qavp_export.plots import write_bytes

_INPUTS = 4


@dataclass(frozen=True)
class Outputs:
    """Files to write; None: none.

    Attributes:
        json_file: Every figure and sample.
        csv_file: The figures.
        report: The page.
    """

    json_file: Path | None
    csv_file: Path | None
    report: Path | None

    def check(self) -> None:
        """Checks that all can be written, before anything is measured.

        Raises:
            InputError: A folder is missing, or the page's name is not one.
            UnavailableError: matplotlib is not installed.
        """
        for path in (self.json_file, self.csv_file, self.report):
            if path is not None and not path.absolute().parent.is_dir():
                raise InputError(f"{path} cannot be written: its folder does not exist; make it first")
        if self.report is not None:
            if self.report.suffix.lower() not in (".html", ".htm"):
                raise InputError(f"--report {self.report} is a page: its name ends in .html")
            check_report()

    def write(self, summary: dict[str, Any]) -> list[Path]:
        """Writes them and returns their names.

        Raises:
            InputError: One cannot be written.
        """
        written: list[Path] = []
        if self.json_file is not None:
            write_bytes(self.json_file, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
            written.append(self.json_file)
        if self.csv_file is not None:
            write_bytes(self.csv_file, to_csv(summary).encode())
            written.append(self.csv_file)
        return written if self.report is None else [*written, *write_report(summary, self.report)]


@dataclass(frozen=True)
class Judges:
    """Where accuracy comes from, if from anywhere.

    Attributes:
        file: What qavp-eval wrote.
        data: Questions to ask here, with the first engine that runs a bundle.
    """

    file: Path | None
    data: DataSet | None

    def judge(self, comparison: Comparison, progress: Progress) -> dict[Path, Accuracy]:
        """Returns the accuracy of the bundles that were measured.

        Raises:
            QavpError: The file is none of that kind, or a question does not fit a bundle.
        """
        engines: dict[Path, str] = {}
        for measured in comparison.measured:
            engines.setdefault(measured.entry.bundle, measured.entry.engine)
        if self.file is not None and engines:
            return read_accuracy(self.file, list(engines))
        if self.data is None:
            return {}
        return {bundle: measure_accuracy(bundle, engine, self.data, progress) for bundle, engine in engines.items()}


@dataclass(frozen=True)
class Sweep:
    """One checkpoint at several keep ratios.

    Attributes:
        text: As the user wrote it: `keep=0.05,0.125`.
        model: The checkpoint as the user named it.
        recipe: A preset or a recipe file.
        work: Where the bundles are.
    """

    text: str
    model: str
    recipe: str
    work: Path

    def bundles(self, engines: Sequence[str], progress: Progress) -> list[tuple[str, Path]]:
        """Exports what is missing; returns a name for reports and the folder of each.

        Raises:
            QavpError: As `pipeline.export`.
        """
        ratios = parse_sweep(self.text)
        folder = resolve_model(self.model, progress=False).folder
        name = folder.name if Path(self.model).exists() else self.model
        return export_sweep(folder, name, self.recipe, ratios, self.work, sweep_targets(engines), progress)


def parse_engines(text: str) -> list[str]:
    """Reads `NAME,NAME`.

    Raises:
        InputError: An engine does not exist.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in ENGINES), None)
    if unknown is not None or not names:
        raise InputError(f"--engines {(unknown or text)[:40]!r} does not exist; choose from {', '.join(ENGINES)}")
    return list(dict.fromkeys(names))


def make_requests(
    images: Sequence[Path] | None, prompt: str | None, tokens: int, keep: float | None
) -> tuple[Request, ...]:
    """Returns what is asked: one request for each image, or the demo's.

    Raises:
        InputError: An image is missing.
    """
    if images:
        missing = next((path for path in images if not path.is_file()), None)
        if missing is not None:
            raise InputError(f"--image {missing} is not a file; check the path")
        shown: list[tuple[tuple[str, ...], str]] = [
            ((str(path.absolute()),), prompt or DEFAULT_PROMPT) for path in images
        ]
    else:
        drawn = demo_calibration(_INPUTS, 0).items
        shown = [(tuple(str(path) for path in item.images), prompt or item.prompt) for item in drawn]
    return tuple(Request(files, text, tokens, keep) for files, text in shown)


def make_entries(bundles: Sequence[tuple[str, Path]], engines: Sequence[str]) -> tuple[Entry, ...]:
    """Returns every bundle with every engine.

    Args:
        bundles: Names and folders.
        engines: Names of engines.

    Raises:
        InputError: There are no bundles, or one is none.
    """
    if not bundles:
        raise InputError("there is nothing to compare; give bundles, or --sweep and --model; see qavp-bench --help")
    for _, path in bundles:
        Manifest.read(path)
    names = [name for name, _ in bundles]
    # Bundles of one name in different folders are told apart by their paths.
    shown = [(name if names.count(name) == 1 else str(path), path) for name, path in bundles]
    return tuple(Entry(path, engine, name) for name, path in shown for engine in engines)


def check_measured(comparison: Comparison) -> None:
    """Checks that there are figures.

    Raises:
        UnavailableError: No engine is available here.
        QavpError: One failed.
    """
    if not comparison.measured:
        reasons = "; ".join(f"{missing.entry.label}: {missing.reason}" for missing in comparison.missing)
        kind = QavpError if any(missing.failed for missing in comparison.missing) else UnavailableError
        raise kind(f"nothing could be measured ({reasons})")
