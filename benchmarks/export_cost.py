"""What an export costs: time, memory, bytes read and written, how they grow, beside ONNX Runtime GenAI's model builder.

python benchmarks/export_cost.py --shape llava-1.5-7b --json export_cost.json

Both programs run on the same random weights, each in a virtual environment that this script makes with pip: qavp-export
on the LLaVA checkpoint with its default recipe, the model builder on the Llama decoder alone, 4-bit for CPUs.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import make_checkpoint
import typer
from cost_report import TITLES, Run, Tool, print_table, report
from environments import copy_project, install, versions
from llama_decoder import extract_decoder
from process_cost import check_supported, evict, measure
from rich.console import Console

from qavp_export.cli.common import run_command
from qavp_export.errors import InputError, QavpError, UnavailableError
from qavp_export.safetensors_index import find_weights

SMALL = "llava-1b"
# The rest comes with them. Of what torch and transformers are, constraints.txt has the versions.
BUILDER_PACKAGES = ("onnxruntime-genai==0.18.0", "onnx-ir", "torch", "transformers")
LEFT_FREE = 2_000_000_000
ENVIRONMENT_BYTES = 2_500_000_000
# Of a float16 checkpoint: upper bounds of the 4-bit outputs, embeddings in float included.
OUTPUT_SHARE = 0.5
VISION_PARAMETERS = 330_000_000


@dataclass(frozen=True)
class Steps:
    """Tells what is being done, and since when."""

    console: Console
    started: float

    def say(self, what: str) -> None:
        """Prints a line."""
        self.console.print(f"[{time.perf_counter() - self.started:6.0f} s] {what}", highlight=False, markup=False)

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[Callable[[float, int], None]]:
        """Prints a line, and yields what shows seconds and bytes of memory below it."""
        self.say(what)
        with self.console.status("starts") as status:
            yield lambda seconds, resident: status.update(f"{seconds:.0f} s, {resident / 2**30:.2f} GiB")


@dataclass(frozen=True)
class Bench:
    """Where the work is done, and how.

    Attributes:
        work: The folder for checkpoints, environments and outputs.
        keep: Whether checkpoints stay in it.
        layers: Decoder layers of every checkpoint; None: all.
        limit: Bytes of memory that an export may take.
        pythons: Python of each tool's environment.
        steps: Tells what is being done.
    """

    work: Path
    keep: bool
    layers: int | None
    limit: int
    pythons: Mapping[Tool, Path]
    steps: Steps

    def measure(self, shape: str) -> Iterator[Run]:
        """Yields a run of each tool on a shape."""
        checkpoint = checkpoint_folder(self.work, shape, self.layers)
        if not checkpoint.exists():
            self.steps.say(f"{shape}: write the checkpoint")
            unfinished = checkpoint.with_name(f"{checkpoint.name}-unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make_checkpoint.main(unfinished, shape, self.layers)
            unfinished.rename(checkpoint)
        decoder = self.work / f"{checkpoint.name}-decoder"
        with contextlib.ExitStack() as remains:
            if not self.keep:
                remains.callback(shutil.rmtree, checkpoint, ignore_errors=True)
            if Tool.OURS in self.pythons:
                yield self._export(Tool.OURS, shape, checkpoint)
            if Tool.BUILDER in self.pythons:
                self.steps.say(f"{shape}: write the decoder as a checkpoint of its own")
                shutil.rmtree(decoder, ignore_errors=True)
                remains.callback(shutil.rmtree, decoder, ignore_errors=True)
                extract_decoder(checkpoint, decoder)
                yield self._export(Tool.BUILDER, shape, decoder)

    def _export(self, tool: Tool, shape: str, source: Path) -> Run:
        log = self.work / "logs" / f"{source.name}-{tool}"
        log.mkdir(parents=True, exist_ok=True)
        weights = find_weights(source).values()
        with (
            tempfile.TemporaryDirectory(dir=self.work, prefix="output-") as folder,
            self.steps.watching(f"{shape}: {TITLES[tool]}") as tick,
        ):
            output = Path(folder) / "output"
            command = command_line(tool, self.pythons[tool], source, output)
            evict(source)
            # Nothing is to be fetched: without this, transformers asks the Hub about files a folder lacks.
            offline = {"HF_HUB_OFFLINE": "1"}
            cost = measure(command, inputs=source, log=log, limit=self.limit, environment=offline, tick=tick)
            written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        run = Run(
            tool=tool,
            model=shape,
            command=command,
            parameters=sum(math.prod(info.shape) for info in weights),
            input_bytes=sum(info.nbytes for info in weights),
            output_bytes=written,
            limit_bytes=self.limit,
            cost=cost,
            last_line=_last_line(log / "stderr") if cost.exit_code else "",
            summary=json.loads((log / "stdout").read_bytes()) if tool is Tool.OURS and not cost.exit_code else {},
        )
        gib = cost.peak_rss_bytes / 2**30
        self.steps.say(f"{shape}: {TITLES[tool]}: {run.outcome}, {cost.wall_s:.0f} s, {gib:.2f} GiB")
        return run


def checkpoint_folder(work: Path, shape: str, layers: int | None) -> Path:
    """Returns the folder of a shape's checkpoint."""
    return work / (shape if layers is None else f"{shape}-{layers}layers")


def command_line(tool: Tool, python: Path, source: Path, output: Path) -> list[str]:
    """Returns the command that exports `source` to `output`, with the tool's defaults."""
    if tool is Tool.OURS:
        return [str(python.with_name("qavp-export")), "--model", str(source), "-o", str(output), "--json"]
    builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(output)]
    cache = str(output.with_name("cache"))
    return [*builder, "-p", "int4", "-e", "cpu", "-c", cache, "--extra_options", "hf_token=false"]


def needed_bytes(shapes: Sequence[str], tools: Sequence[Tool], work: Path, layers: int | None) -> int:
    """Returns how much must be free in `work`, roughly: what is there at the same time, less what is there already."""
    checkpoints = {shape: checkpoint_folder(work, shape, layers) for shape in shapes}
    largest = max(2 * parameters(shape, layers) for shape in shapes)
    missing = [2 * parameters(shape, layers) for shape, folder in checkpoints.items() if not folder.exists()]
    environments = ENVIRONMENT_BYTES * sum(not (work / tool).exists() for tool in tools)
    # The builder's own checkpoint is there while it writes; ours writes before.
    beside = largest * ((1 if Tool.BUILDER in tools else 0) + OUTPUT_SHARE)
    return sum(missing) + int(beside) + environments


def parameters(shape: str, layers: int | None = None) -> int:
    """Returns roughly how many parameters a checkpoint has."""
    sizes = make_checkpoint.SHAPES[shape]
    attention = 2 * sizes.hidden**2 * (1 + sizes.kv_heads / sizes.heads)
    layer = attention + 3 * sizes.hidden * sizes.intermediate
    return int(VISION_PARAMETERS + 2 * sizes.vocab * sizes.hidden + (layers or sizes.layers) * layer)


def available_memory() -> int:
    """Returns the bytes of memory that programs can take without swapping."""
    found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise UnavailableError("/proc/meminfo does not say how much memory is free; give --memory")
    return 1024 * int(found.group(1))


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed no error")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(make_checkpoint.SHAPES)}.")] = "llava-1.5-7b",
    only: Annotated[Tool | None, typer.Option(help="Measure one of the two alone.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers, to truncate the models for a try.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB that an export may take; default: what is free, less 2.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, environments and logs, which stay there for reuse.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here, run by run.")] = None,
) -> None:
    """Exports random checkpoints of llava-1b and of a shape, and prints one table of what it cost."""
    if shape not in make_checkpoint.SHAPES:
        raise InputError(f"--shape {shape!r} is not known; choose one of {', '.join(make_checkpoint.SHAPES)}")
    check_supported()
    limit = available_memory() - LEFT_FREE if memory is None else int(memory * 1e9)
    tools = [only] if only else list(Tool)
    steps = Steps(Console(stderr=True), time.perf_counter())
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="export_cost-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        shapes = list(dict.fromkeys((SMALL, shape)))
        check_disk(folder, needed_bytes(shapes, tools, folder, layers), steps)
        pythons = _environments(folder, tools, steps)
        details: dict[str, Any] = {
            "layers": layers,
            "memory_limit_bytes": limit,
            "versions": {tool: versions(python) for tool, python in pythons.items()},
        }
        bench = Bench(folder, work is not None, layers, limit, pythons, steps)
        runs: list[Run] = []
        for run in (run for name in shapes for run in bench.measure(name)):
            runs.append(run)
            if json_file is not None:
                json_file.write_text(json.dumps(report(runs, shape, details), indent=2) + "\n", encoding="utf-8")
    print_table(runs, shape, Console(width=160))
    for run in runs:
        if run.outcome == "failed":
            raise QavpError(f"{TITLES[run.tool]} failed on {run.model}: {run.last_line}")


def check_disk(folder: Path, needed: int, steps: Steps) -> None:
    """Says how much disk is needed, and how much is free.

    Raises:
        UnavailableError: Less is free than is needed.
    """
    free = shutil.disk_usage(folder).free
    line = f"about {needed / 1e9:.0f} GB of disk are needed in {folder}, {free / 1e9:.0f} GB are free"
    if free < needed:
        raise UnavailableError(f"{line}; give --work on a larger disk")
    steps.say(line)


def _environments(folder: Path, tools: Sequence[Tool], steps: Steps) -> dict[Tool, Path]:
    pythons: dict[Tool, Path] = {}
    for tool in tools:
        steps.say(f"install {TITLES[tool]}")
        packages = [copy_project(folder / "source")] if tool is Tool.OURS else BUILDER_PACKAGES
        pythons[tool] = install(folder / tool, packages)
    return pythons


if __name__ == "__main__":
    raise SystemExit(run_command(app, "export_cost"))
