"""What scoring and selecting vision tokens costs, beside the vision stage that it is part of.

python benchmarks/make_checkpoint.py --shape llava-1b checkpoint
qavp-export --model checkpoint -o bundle
python benchmarks/selection_cost.py bundle --width 4096 --json selection_cost.json

The bundle's own vision encoder runs one image, and as many tiles as LLaVA-NeXT makes of one. Score and selection run
alone, on random features of as many tokens, selected from together, in the form that the CPU engine gives them. All
alternate in one process, so that what slows the machine down slows all of them down. Where other work takes the cores
in turns, `--processor-time` counts what this process was given, on one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qavp_export.cli.common import run_command
from qavp_export.engines import Engine, EngineOptions, load_engine
from qavp_export.engines.ort.lowering.selection import lower_selection
from qavp_export.engines.ort.session import CPU_PROVIDER, session_options
from qavp_export.errors import InputError
from qavp_export.manifest import Manifest
from qavp_export.numerics.select import Select, tokens_to_keep
from qavp_export.passes import PruneVisionTokens

TILES = (1, 5)
STAGES = ("w8a8", "fp32")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def measure_command(
    bundle: Annotated[Path, typer.Argument(help="A bundle of a model with one image per unit.")],
    keep: Annotated[float, typer.Option(help="Fraction of tokens kept.")] = 0.125,
    width: Annotated[int | None, typer.Option(help="Channels per token; by default the bundle's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads; by default one per core.")] = None,
    processor_time: Annotated[bool, typer.Option(help="Count processor time instead, on one thread.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measures the vision stage, and score and selection in it, and prints a table."""
    del debug  # read by run_command
    clock, threads = (time.process_time, 1) if processor_time else (time.perf_counter, threads)
    manifest = Manifest.read(bundle)
    count, width = manifest.vision_tokens.before, width or manifest.decoder.hidden_size
    if count is None:
        raise InputError(f"images of {bundle} vary in size; take a bundle with a fixed number of tokens")
    engines = {
        stage: load_engine("ort-cpu", bundle, manifest, EngineOptions(threads=threads, vision=stage))
        for stage in STAGES
    }
    sizes, options = {}, EngineOptions(threads=threads)
    for tiles in TILES:
        tokens = tiles * count
        runs = {f"vision {stage}": vision_stage(engine, manifest, tiles) for stage, engine in engines.items()}
        for select in get_args(Select):
            runs[select] = selection(select, tokens, width, tokens_to_keep(tokens, keep), options)
        sizes[f"{tokens} x {width} -> {tokens_to_keep(tokens, keep)}"] = alternate(runs, repeats, clock)
    if json_file is not None:
        report = {
            "bundle": bundle.name,
            "repeats": repeats,
            "threads": threads,
            "clock": clock.__name__,
            "milliseconds": sizes,
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Console(width=120).print(table(sizes))


def vision_stage(engine: Engine, manifest: Manifest, tiles: int) -> Callable[[], object]:
    """Returns what runs a bundle's vision encoder on random tiles."""
    (pixels,) = [spec for spec in manifest.components["vision_encoder"].inputs if spec.name == "pixel_values"]
    shape = [size for size in pixels.shape if isinstance(size, int)]
    images = np.random.default_rng(0).standard_normal((tiles, *shape)).astype(np.float32)
    return lambda: engine.encode_images({"pixel_values": images})


def selection(select: Select, tokens: int, width: int, kept: int, options: EngineOptions) -> Callable[[], object]:
    """Returns what scores random features and selects from them, as the CPU engine does.

    The scorer is `random`, a constant: what the others compute belongs to the tower's attention.
    """
    features = ir.val("features", ir.DataType.FLOAT, ir.Shape([1, tokens, width]))
    copy = ir.node("Identity", [features])
    copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = "image_features", features.type, features.shape
    graph = ir.Graph([features], copy.outputs, nodes=[copy], opset_imports={"": 23}, name="selection")
    model = ir.Model(graph, ir_version=11)
    PruneVisionTokens(tokens=kept, semantic="random", select=select)(model)
    lower_selection(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), session_options(options), [CPU_PROVIDER])
    feeds = {"features": _tokens(tokens, width)}
    return lambda: session.run(None, feeds)


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns the milliseconds of each run, one after the other in turns; a first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(repeats + 1), description="turns", console=Console(stderr=True)):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                seconds[name].append(1e3 * (clock() - start))
    return seconds


def table(sizes: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """Returns medians, and what share of the vision stage they are."""
    result = Table("tokens", "what", "ms", *(f"% of {stage} stage" for stage in STAGES), box=None, pad_edge=False)
    for size, runs in sizes.items():
        medians = {name: float(np.median(values)) for name, values in runs.items()}
        for name, milliseconds in medians.items():
            row: list[Any] = [size, name if name.startswith("vision") else f"score and {name}", f"{milliseconds:.1f}"]
            shares = [f"{100 * milliseconds / medians[f'vision {stage}']:.1f}" for stage in STAGES]
            result.add_row(*row, *(shares if not name.startswith("vision") else []))
    return result


def _tokens(tokens: int, width: int) -> npt.NDArray[np.float32]:
    """Features that differ in a few hundred directions, as those of images do."""
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((min(width, 256), width))
    values = rng.standard_normal((1, tokens, len(directions))) @ directions
    return values.astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(run_command(app, "selection_cost"))
