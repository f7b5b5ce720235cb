"""What the cells of the paper's table say: figures with intervals, tables, and charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from paper_regimes import REGIMES
from paper_sweep import Cell, Outcome
from rich.console import Console
from rich.table import Table

from qavp_export.plots import PALETTE, new_figure, save
from qavp_export.statistics import bootstrap_interval, mcnemar, mean, paired_bootstrap

# From this score on an answer counts as right where only right and wrong can be counted.
_RIGHT = 0.5
FULL = "full"
_LEVEL = 0.05
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Subject:
    """What was measured of one checkpoint.

    Attributes:
        name: What tables call it.
        data: Name of the data set.
        metric: How answers are judged.
        kinds: Type of each question.
        tokens: Vision tokens of a picture before pruning.
        outcomes: The scores of each cell.
    """

    name: str
    data: str
    metric: str
    kinds: Sequence[str]
    tokens: int
    outcomes: Mapping[Cell, Outcome]


def semantic_baseline(cell: Cell) -> Cell:
    """Returns what every cell is compared with: top-k by the semantic score alone, same regime and share."""
    return Cell(cell.regime, alpha=1.0, keep=cell.keep)


def paper_score(cell: Cell) -> Cell:
    """Returns the paper's own choice: top-k by the hybrid score at alpha 0.5, same regime and share."""
    return Cell(cell.regime, alpha=0.5, keep=cell.keep)


def figures(subject: Subject, seed: int) -> list[dict[str, Any]]:
    """Returns the figures of each cell as JSON values.

    Args:
        subject: What was measured.
        seed: Seed of the intervals.
    """
    return [_figures_of(cell, subject, seed) for cell in subject.outcomes]


def _figures_of(cell: Cell, subject: Subject, seed: int) -> dict[str, Any]:
    outcome = subject.outcomes[cell]
    means = outcome.scores.mean(axis=0)
    kinds = np.array(subject.kinds)
    found = asdict(cell) | {
        "accuracy": bootstrap_interval(means, mean, seed).to_dict(),
        "by_type": {kind: float(means[kinds == kind].mean()) for kind in dict.fromkeys(subject.kinds)},
        "accuracy_by_seed": outcome.scores.mean(axis=1).tolist(),
    }
    if cell.keep < 1:
        for name, other in (("semantic", semantic_baseline(cell)), ("paper", paper_score(cell))):
            if other in subject.outcomes and other != cell:
                found[f"against_{name}"] = _compare(outcome, subject.outcomes[other], seed)
    if (beyond := _beyond_full(cell, subject, seed)) is not None:
        found["gain_beyond_full"] = beyond
    base = subject.outcomes.get(semantic_baseline(cell))
    if base is not None and len(outcome.scales) and cell.keep < 1:
        # Above 1: what this cell keeps makes the scales that all tokens share coarser.
        found["scales_to_semantic"] = float(np.exp(np.log(outcome.scales / base.scales).mean()))
    return found


def _beyond_full(cell: Cell, subject: Subject, seed: int) -> dict[str, float] | None:
    """Returns a quantized cell's gain over the semantic baseline less that of the same cell in full precision.

    What is left is what the choice does for quantization: choosing better tokens helps every regime.
    """
    quartet = [cell, semantic_baseline(cell), replace(cell, regime=FULL), semantic_baseline(replace(cell, regime=FULL))]
    if cell.keep == 1 or len(set(quartet)) < len(quartet) or not all(one in subject.outcomes for one in quartet):
        return None
    ours, base, full, full_base = (subject.outcomes[one].scores.mean(axis=0) for one in quartet)
    return paired_bootstrap(ours - base, full - full_base, seed).to_dict()


def _compare(a: Outcome, b: Outcome, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = paired_bootstrap(a.scores.mean(axis=0), b.scores.mean(axis=0), seed).to_dict()
    # Outcomes of several draws on one question depend on one another: no sign test.
    single = len(a.scores) == len(b.scores) == 1
    return found | {"mcnemar": asdict(mcnemar(a.scores[0] >= _RIGHT, b.scores[0] >= _RIGHT)) if single else None}


def pooled(subjects: Sequence[Subject], seed: int) -> list[dict[str, Any]]:
    """Returns the differences over checkpoints that were asked the same questions, such as training seeds.

    A question's score is its mean over the checkpoints, and questions are resampled: the interval says nothing of the
    spread between trainings, which `by_subject` shows.

    Args:
        subjects: What was measured; those that are alone with their questions are left out.
        seed: Seed of the intervals.
    """
    found = []
    for group in _groups(subjects):
        shared = [cell for cell in group[0].outcomes if all(cell in one.outcomes for one in group)]
        for cell in shared:
            base = semantic_baseline(cell)
            if cell.keep == 1 or cell == base or base not in shared:
                continue
            ours, theirs = (_stack(group, which) for which in (cell, base))
            found.append(
                asdict(cell)
                | {
                    "subjects": [one.name for one in group],
                    "accuracy": bootstrap_interval(ours.mean(axis=0), mean, seed).to_dict(),
                    "against_semantic": paired_bootstrap(ours.mean(axis=0), theirs.mean(axis=0), seed).to_dict(),
                    "by_subject": (ours - theirs).mean(axis=1).tolist(),
                }
            )
    return found


def _groups(subjects: Sequence[Subject]) -> Iterable[list[Subject]]:
    by_data: dict[tuple[Any, ...], list[Subject]] = {}
    for subject in subjects:
        by_data.setdefault((subject.data, *subject.kinds), []).append(subject)
    return [group for group in by_data.values() if len(group) > 1]


def _stack(group: Sequence[Subject], cell: Cell) -> npt.NDArray[np.float64]:
    return np.stack([one.outcomes[cell].scores.mean(axis=0) for one in group])


def holm(values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(values)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def print_tables(report: Mapping[str, Any]) -> None:
    """Prints a report: for each checkpoint alpha and score by regime, then selectors, then all checkpoints together."""
    console = Console(width=150)
    for name, subject in report["subjects"].items():
        rows = subject["figures"]
        ranked = [row for row in rows if row["select"] == "topk" and row["score"] != "random" and row["keep"] < 1]
        where = f"{name}: {subject['data']}, {report['questions']} questions, {subject['metric']}, %"
        console.print(_table(f"{where}; top-k, difference from alpha 1 [95%]", ranked))
        console.print(_table(f"{where}; selectors and controls", [row for row in rows if row not in ranked]))
        console.print(_significance(ranked))
    if report["pooled"]:
        console.print(_table("mean of checkpoints with the same questions", report["pooled"]))


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    keeps = sorted({row["keep"] for row in rows})
    table = Table("regime", "selection", title=title, box=None, pad_edge=False)
    for keep in keeps:
        table.add_column("all tokens" if keep == 1 else f"keep {keep:g}")
    lines: dict[tuple[str, str], dict[float, str]] = {}
    for row in rows:
        lines.setdefault((row["regime"], _label(row)), {})[row["keep"]] = _text(row)
    for (regime, label), texts in lines.items():
        table.add_row(regime, label, *(texts.get(keep, "") for keep in keeps))
    return table


def _label(row: Mapping[str, Any]) -> str:
    if row["keep"] == 1:
        return "all tokens"
    if row["select"] == "maxmin":
        return "maxmin"
    if row["score"] in ("flat", "random"):
        return f"{row['select']} {row['score']}" + (f", {row['seeds']} draws" if row["seeds"] > 1 else "")
    score = "" if row["score"] == "raw" else f" {row['score']}"
    return f"{row['select']}{score} alpha {row['alpha']:g}"


def _text(row: Mapping[str, Any]) -> str:
    accuracy, difference = row["accuracy"], row.get("against_semantic")
    if difference is None:
        return f"{100 * accuracy['estimate']:.1f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"
    marks = "*" if _excludes_zero(difference) else ""
    marks += "+" if _excludes_zero(row.get("gain_beyond_full")) else ""
    span = (
        f"{100 * difference['estimate']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]{marks}"
    )
    return f"{100 * accuracy['estimate']:.1f} ({span})"


def _excludes_zero(interval: Mapping[str, float] | None) -> bool:
    return interval is not None and (interval["low"] > 0 or interval["high"] < 0)


def _significance(rows: Sequence[Mapping[str, Any]]) -> str:
    """Says how many of a table's comparisons would be left if their number is taken into account."""
    beyond = [row for row in rows if "gain_beyond_full" in row]
    apart = sum(_excludes_zero(row["gain_beyond_full"]) for row in beyond)
    values = [row["against_semantic"]["mcnemar"]["p"] for row in rows if row.get("against_semantic")]
    alone, together = (sum(p < _LEVEL for p in found) for found in (values, holm(values)))
    return (
        f"* the interval excludes 0. McNemar p < {_LEVEL:g} in {alone} of {len(values)} comparisons with alpha 1; "
        f"in {together} after Holm's correction for their number.\n"
        f"+ the gain less that of the same choice in full precision excludes 0: {apart} of {len(beyond)}.\n"
    )


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws accuracy against alpha, one picture for each checkpoint.

    Args:
        report: The report.
        folder: Where pictures go; made if missing.

    Returns:
        The files.

    Raises:
        UnavailableError: matplotlib is not installed.
        InputError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, subject in report["subjects"].items():
        rows = [row for row in subject["figures"] if (row["select"], row["score"]) == ("topk", "raw")]
        files.append(folder / f"{name}-alpha.png")
        save(_alpha_chart(name, [row for row in rows if row["keep"] < 1]), files[-1])
    return files


def _alpha_chart(name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    keeps = sorted({row["keep"] for row in rows})
    figure = new_figure(3.6 * len(keeps), 3.6)
    grid = figure.subplots(1, len(keeps), sharey=True, squeeze=False)[0]
    for axes, keep in zip(grid, keeps, strict=True):
        for index, regime in enumerate(dict.fromkeys(row["regime"] for row in rows)):
            points = sorted(
                ((row["alpha"], row["accuracy"]) for row in rows if (row["regime"], row["keep"]) == (regime, keep)),
                key=lambda point: point[0],
            )
            alphas = [alpha + 0.012 * (index - 2) for alpha, _ in points]  # side by side, so that bars can be read
            means = [100 * found["estimate"] for _, found in points]
            spans = [[100 * abs(found[end] - found["estimate"]) for _, found in points] for end in ("low", "high")]
            style = {"marker": _MARKERS[index % len(_MARKERS)], "color": PALETTE[index % len(PALETTE)]}
            axes.errorbar(alphas, means, yerr=spans, label=regime, capsize=2, markersize=4, linewidth=1, **style)
        axes.set_title(f"{name}, keep {keep:g}", fontsize=9)
        axes.set_xlabel("alpha (1: semantic score alone)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, alpha=0.3)
    grid[0].set_ylabel("accuracy, %", fontsize=8)
    grid[-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    return figure


def legend() -> str:
    """Returns what the regimes' names mean, line by line."""
    return "\n".join(f"{name}: {regime.meaning}" for name, regime in REGIMES.items())
