"""Accuracy of the demo model at several recipes, on the same held-out questions, through the exported bundles.

python benchmarks/demo_accuracy.py --questions 600 --json demo_accuracy.json
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qavp_export import QavpModel, pipeline
from qavp_export.recipe import make_recipe

EXAMPLE = Path(__file__).parents[1] / "examples" / "shapes_vqa"
sys.path.insert(0, str(EXAMPLE))
from data import TYPES, Item, ShapesStream  # noqa: E402  # the example is a folder of scripts, not a package

# Name -> preset and recipe fields.
ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "float, all tokens": ("none", {"keep": 1.0}),
        "W4A4 rtn, all tokens": ("rtn", {"keep": 1.0}),
        "W4A4 rotate, all tokens": ("rotate", {"keep": 1.0}),
        "W4A4 gptq, all tokens": ("gptq", {"keep": 1.0}),
        "float, hybrid": ("none", {"keep": 0.125}),
        "W4A4 rtn, hybrid": ("rtn", {"keep": 0.125}),
        "W4A4 rotate, hybrid (default)": ("rotate", {"keep": 0.125}),
        "W4A4 gptq, hybrid": ("gptq", {"keep": 0.125}),
        "W4A4 rotate, hybrid on rms": ("rotate", {"keep": 0.125, "score_input": "rms"}),
        "W4A4 rotate, hybrid with received": ("rotate", {"keep": 0.125, "semantic": "received"}),
        "W4A4 rotate, semantic (cls) alone": ("rotate", {"keep": 0.125, "alpha": 1.0}),
        "W4A4 rotate, sensitivity alone": ("rotate", {"keep": 0.125, "alpha": 0.0}),
        "W4A4 rotate, random": ("rotate", {"keep": 0.125, "semantic": "random", "alpha": 1.0}),
    }
)
BATCH = 20


def main(
    questions: Annotated[int, typer.Option(help="Held-out questions, six types in rotation.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the held-out stream.")] = 4242,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Exports each arm, asks it the same questions, and prints a table."""
    items = ShapesStream("heldout", seed).items(questions)
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            arm: _measure(Path(folder) / str(number), arm, items)
            for number, arm in enumerate(track(ARMS, description="arms", console=Console(stderr=True)))
        }
    if json_file is not None:
        report = {"questions": questions, "seed": seed, "arms": figures}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print(figures, questions)


def _measure(bundle: Path, arm: str, items: Sequence[Item]) -> dict[str, Any]:
    """Returns exact match in percent, in all and by type, and the share of foreground patches kept."""
    preset, fields = ARMS[arm]
    recipe = make_recipe(preset, fields)
    pipeline.export(EXAMPLE / "model", recipe, bundle, name="shapes_vqa", force=False, progress=lambda *_: None)
    model = QavpModel.from_bundle(bundle)
    right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    kept: list[float] = []
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        pictures = [Image.fromarray(item.image) for item in batch]
        prompts = [item.question.text for item in batch]
        for item, indices in zip(batch, model.prepare(list(pictures), prompts).kept_indices, strict=True):
            kept.append(float(item.foreground[indices].sum() / item.foreground.sum()))
        for item, answer in zip(batch, model.generate(list(pictures), prompts, max_new_tokens=6), strict=True):
            right[item.question.type].append(answer == item.question.answer)
    everything = [value for values in right.values() for value in values]
    return {
        "tokens": model.manifest.vision_tokens.after,
        "accuracy": 100 * sum(everything) / len(everything),
        "interval_95": _wilson(sum(everything), len(everything)),
        "by_type": {kind: 100 * sum(values) / max(len(values), 1) for kind, values in right.items()},
        "foreground_kept": 100 * sum(kept) / len(kept),
    }


def _wilson(successes: int, trials: int) -> list[float]:
    """Returns the 95% Wilson interval of a proportion, in percent."""
    z, p = 1.96, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return [100 * (centre - half), 100 * (centre + half)]


def _print(figures: Mapping[str, dict[str, Any]], questions: int) -> None:
    title = f"exact match in %, {questions} held-out questions, greedy"
    table = Table("arm", "tokens", "all [95%]", *TYPES, "foreground kept", title=title, box=None, pad_edge=False)
    for arm, facts in figures.items():
        low, high = facts["interval_95"]
        table.add_row(
            arm,
            str(facts["tokens"]),
            f"{facts['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
            *(f"{facts['by_type'][kind]:.0f}" for kind in TYPES),
            f"{facts['foreground_kept']:.0f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
