"""What qavp-export shows: progress bars while it works, and what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from qavp_export.bundle import GRAPH_NAME
from qavp_export.manifest import Manifest
from qavp_export.numerics.score import PAPER_ALPHA, PAPER_OUTLIER_WEIGHT
from qavp_export.units import megabytes

if TYPE_CHECKING:
    # It imports torch, which qavp-inspect does without.
    from qavp_export.estimate import Estimate

_DECODER_PREFIX = "decoder:"


class ProgressBars:
    """One bar on stderr for each stage of an export; a context manager.

    Args:
        enabled: Whether anything is shown.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._tasks: dict[str, TaskID] = {}
        self._current: str | None = None

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()
        self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` steps of a stage are complete; a new stage completes the one before."""
        if stage != self._current:
            self._finish()
            self._current = stage
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def _finish(self) -> None:
        if self._current is not None:
            task = self._tasks[self._current]
            self._progress.update(task, completed=self._progress.tasks[task].total)


def summary(manifest: Manifest, bundle: Path) -> dict[str, Any]:
    """Returns what an export did, as JSON values."""
    decoder = [value for layer, value in manifest.precision.items() if layer.startswith(_DECODER_PREFIX)]
    sizes = {
        component: sum(entry.bytes for entry in manifest.files if entry.path.startswith(f"{component}/"))
        for component in manifest.components
    }
    return {
        "bundle": str(bundle),
        "model": manifest.source,
        "family": manifest.family,
        "vision_tokens": {"before": manifest.vision_tokens.before, "after": manifest.vision_tokens.after},
        "recipe": manifest.recipe,
        "decoder_linears": dict(Counter(decoder)),
        "weight_error": _error_summary(manifest.weight_error),
        "notes": manifest.notes,
        "calibration": manifest.calibration,
        "alpha_fit": manifest.alpha_fit,
        "checkpoint_quantization": manifest.checkpoint_quantization,
        "checkpoint_bytes": manifest.checkpoint_bytes,
        "bundle_bytes": sum(entry.bytes for entry in manifest.files),
        "component_bytes": sizes,
        "parity": manifest.parity,
        "engines": manifest.engines,
    }


def print_summary(manifest: Manifest, bundle: Path, title: str) -> None:
    """Prints what an export did, for people."""
    facts = summary(manifest, bundle)
    recipe, tokens = manifest.recipe, manifest.vision_tokens
    table = _facts_table(title)
    weights = f"alpha {recipe['alpha']}"
    if recipe.get("outlier_weight", PAPER_OUTLIER_WEIGHT) != PAPER_OUTLIER_WEIGHT:
        weights += f", outlier weight {recipe['outlier_weight']}"
    how = f"{recipe['select']} by {recipe['semantic']}, {weights}, {recipe['score_input']} features"
    all_kept = tokens.keep_range is None and (tokens.keep == 1 or (tokens.after or 0) == tokens.before)
    pruned = "all kept" if all_kept else f"keep {recipe['keep']}, {how}"
    budget = _budget(tokens.before, tokens.after, tokens.keep, tokens.keep_range)
    table.add_row("vision tokens", f"{budget} ({pruned})")
    linears = ", ".join(f"{count} at {name}" for name, count in facts["decoder_linears"].items())
    table.add_row("decoder linears", f"{linears} (group size {recipe['group_size']})")
    if facts["weight_error"] is not None:
        table.add_row("weight error", _error_line(facts["weight_error"], manifest.checkpoint_quantization))
    if manifest.calibration is not None:
        table.add_row("calibrated on", f"{manifest.calibration['prompts']} prompts of {manifest.calibration['data']}")
    if manifest.alpha_fit is not None:
        table.add_row("alpha fit", _fit_line(manifest.alpha_fit))
    for note in manifest.notes:
        table.add_row("note", note)
    table.add_row("size", f"{megabytes(manifest.checkpoint_bytes)} -> {megabytes(facts['bundle_bytes'])}")
    for component, count in facts["component_bytes"].items():
        table.add_row(f"  {component}/{GRAPH_NAME}", megabytes(count))
    table.add_row("parity with PyTorch", _parity_line(manifest.parity))
    for name, engine in manifest.engines.items():
        table.add_row(f"engine {name}", _engine_line(engine))
    table.add_row("bundle", str(bundle))
    Console().print(table)


def _fit_line(fit: Mapping[str, Any]) -> str:
    """Says which weights of the score were chosen, and how much closer to all tokens they stay than the paper's."""
    chosen, paper = fit["chosen"], {"alpha": PAPER_ALPHA, "outlier_weight": PAPER_OUTLIER_WEIGHT}
    divergences = {name: _divergence(fit, weights) for name, weights in (("chosen", chosen), ("paper", paper))}
    found = f"alpha {chosen['alpha']}, outlier weight {chosen['outlier_weight']} on {fit['images']} images"
    if chosen == paper:
        return f"{found}, the paper's: none is better beyond chance"
    return (
        f"{found}: KL {divergences['chosen']:.3f} from all tokens, the paper's 0.5 and 0.5 {divergences['paper']:.3f}"
    )


def _divergence(fit: Mapping[str, Any], weights: Mapping[str, float]) -> float:
    return next(float(entry["kl"]) for entry in fit["candidates"] if weights.items() <= entry.items())


def _engine_line(engine: Mapping[str, Any]) -> str:
    """Says what a lowered engine's graphs run in; what stands in for another on some processors is left out."""
    runs = [
        f"{graph} {', '.join(precisions)}"
        for graph, precisions in engine["precision"].items()
        if not graph.endswith(".unsigned")
    ]
    capabilities = engine.get("capabilities", ())
    return "; ".join([*([_listed_capabilities(capabilities)] if capabilities else []), *runs, *engine["notes"]])


def _listed_capabilities(capabilities: Sequence[int]) -> str:
    return f"compute capability {', '.join(f'{capability / 10:.1f}' for capability in capabilities)}"


def print_estimate(plan: Estimate, model: str, engines: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the plan of a dry run.

    Args:
        plan: The estimate.
        model: The model as the user named it.
        engines: What is to be built beside the engines of ONNX Runtime: version and compute capabilities, by name.
    """
    table = _facts_table(f"plan for {model} (nothing was written, no weight was read)")
    before, after = plan.vision_tokens_before, plan.vision_tokens_after
    table.add_row("vision tokens", _budget(before, after, plan.keep, plan.keep_range))
    table.add_row("semantic scorer", plan.semantic)
    linears = ", ".join(f"{count} at {name}" for name, count in plan.linears.items())
    table.add_row("decoder", f"{plan.decoder_layers} layers; linear layers: {linears}")
    table.add_row("group size", str(plan.group_size))
    table.add_row("parameters", f"{plan.parameters / 1e6:,.1f} M")
    table.add_row("size", f"{megabytes(plan.checkpoint_bytes)} -> about {megabytes(plan.bundle_bytes)}")
    table.add_row("peak memory", f"about {megabytes(plan.peak_memory_bytes)}")
    for name, engine in engines.items():
        built_by = f"to be built by version {engine['version']}"
        built_for = _listed_capabilities(engine["capabilities"])
        table.add_row(f"engine {name}", f"{built_by} for {built_for}; not counted in size and memory")
    Console().print(table)


def _budget(before: int | None, after: int | None, keep: float, keep_range: Sequence[float] | None) -> str:
    """Says what becomes of N vision tokens: how many remain, or which share where that varies."""
    if after is not None:
        return f"{before} -> {after} per image"
    remaining = "all of them" if keep == 1 else f"{keep:.4g} of them"
    if keep_range is not None:
        remaining = f"{keep_range[0]:.4g} to {keep_range[1]:.4g} of them as each call asks, {keep:.4g} unless it does"
    return f"{'as many as the image makes' if before is None else before} -> {remaining}"


def _facts_table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def print_recipes(presets: Mapping[str, Mapping[str, Any]], fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the presets and what the fields of a recipe mean."""
    console = Console()
    table = Table("recipe", "what it does", "sets", title="Recipes", title_justify="left", box=None)
    for name, preset in presets.items():
        sets = ", ".join(f"{key} {value}" for key, value in preset.items() if key not in ("name", "description"))
        table.add_row(name, str(preset["description"]), sets)
    console.print(table)
    table = Table(
        "field", "default", "meaning", title="\nFields (of a YAML recipe file)", title_justify="left", box=None
    )
    for name, field in fields.items():
        table.add_row(name, str(field["default"]), str(field["meaning"]))
    console.print(table)


def _error_summary(errors: Mapping[str, float]) -> dict[str, Any] | None:
    """Returns mean and worst of the layers' relative errors; None if no weight was rounded."""
    if not errors:
        return None
    worst = max(errors, key=lambda layer: errors[layer])
    return {"mean": sum(errors.values()) / len(errors), "worst": errors[worst], "worst_layer": worst}


def _error_line(error: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> str:
    line = f"mean {error['mean']:.1%}, worst {error['worst']:.1%} ({error['worst_layer']})"
    if checkpoint is None:
        return line
    return f"{line}, added to that of the checkpoint's own {checkpoint['method']} {checkpoint['bits']} bit"


def _parity_line(parity: dict[str, Any]) -> str:
    if parity["verdict"] != "PASS":
        return f"{parity['verdict']}: {parity['reason']}"
    return (
        f"PASS: max difference {parity['max_abs']:.1e}, cosine {parity['cosine']:.6f}, "
        f"same next token {parity['argmax_agreement']:.1%}, same kept tokens {parity['kept_indices_equal']:.1%}"
    )
