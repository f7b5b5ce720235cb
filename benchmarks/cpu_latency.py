"""How fast a LLaVA answers on a CPU: ours beside ONNX Runtime's own ways and llama.cpp, on random weights of one shape.

python benchmarks/cpu_latency.py --large --work DIR --json cpu_latency.json

Each contestant runs in processes of its own, one after the other, in two rounds of opposite order, so that a drift of
the machine hits all alike. Everything reads 576 vision tokens, of which (a) keeps 72, and 64 of text; batch 1.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import make_checkpoint
import typer
from cost_report import Tool
from environments import install, versions
from export_cost import (
    SMALL,
    Steps,
    available_memory,
    check_disk,
    checkpoint_folder,
    command_line,
    parameters,
)
from latency_graph import write_last_logits
from latency_process import run
from latency_report import TITLES, Contestant, Entry, Run, print_table, report
from rich.console import Console

from qavp_export.cli.common import run_command
from qavp_export.errors import BundleError, QavpError, UnavailableError
from qavp_export.manifest import Manifest

LARGE = "llava-1.5-7b"
VISION_TOKENS, TEXT_TOKENS = 576, 64
KEEP = 0.125
ANSWER_TOKENS = 32
ROUNDS = 2
LLAMA_PACKAGES = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
FOLDER = Path(__file__).parent
# Bytes of memory and of disk for each parameter, roughly.
MEMORY: Mapping[Contestant, float] = MappingProxyType(
    {
        Contestant.OURS: 2.0,
        Contestant.DENSE: 2.0,
        Contestant.FP32: 4.0,
        Contestant.NBITS: 1.2,
        Contestant.LLAMA: 0.7,
        Contestant.LLAMA_SHORT: 0.7,
    }
)
DISK: Mapping[Contestant, float] = MappingProxyType(
    {
        Contestant.OURS: 0.8,
        Contestant.DENSE: 0.8,
        Contestant.FP32: 2.0,
        Contestant.NBITS: 0.8,
        Contestant.LLAMA: 0.6,
    }
)
EXPORTS: Mapping[Contestant, Sequence[str]] = MappingProxyType(
    {
        Contestant.OURS: ("--keep", f"{KEEP}"),
        Contestant.DENSE: ("--keep", "1.0"),
        Contestant.FP32: ("--keep", "1.0", "--recipe", "none"),
        Contestant.NBITS: ("--keep", "1.0", "--recipe", str(FOLDER / "w4a16_nearest.yaml")),
    }
)
# Level 4 multiplies in 8-bit integers, which is the fastest.
_CONFIGS: Mapping[Contestant, Mapping[str, str]] = MappingProxyType(
    {Contestant.FP32: {}, Contestant.NBITS: {"session.qdq_matmulnbits_accuracy_level": "4"}}
)


@dataclass(frozen=True)
class Llama:
    """The environment of llama.cpp.

    Attributes:
        python: Its Python.
        build: How llama-cpp-python was built.
    """

    python: Path
    build: str


@dataclass(frozen=True)
class Bench:
    """Where the work is done, and how.

    Attributes:
        work: The folder for checkpoints, bundles and environments.
        threads: Threads of every contestant.
        repeats: Fewest runs that count, in each process.
        seconds: How long these take at least.
        kv_cache: Type of keys and values of our engine; None: its default.
        llama: The environment of llama.cpp, or why there is none; None where nobody asked for it.
        steps: Tells what is being done.
    """

    work: Path
    threads: int
    repeats: int
    seconds: float
    kv_cache: str | None
    llama: Llama | UnavailableError | None
    steps: Steps

    def measure(self, shape: str, names: Sequence[Contestant]) -> dict[Contestant, Entry]:
        """Measures contestants at a shape, one process after the other."""
        entries = {name: Entry(prompt_tokens(name)) for name in names}
        commands: dict[Contestant, list[str]] = {}
        for name, entry in entries.items():
            try:
                check_memory(shape, name, available_memory())
                commands[name] = self._prepare(shape, name, entry)
            except QavpError as error:
                entry.skipped, entry.failed = str(error), not isinstance(error, UnavailableError)
                self.steps.say(f"{shape}: {TITLES[name]}: {error}")
        for number in range(ROUNDS):
            for name in reversed(commands) if number % 2 else commands:
                if not entries[name].skipped:
                    self.steps.say(f"{shape}: {TITLES[name]}, round {number + 1} of {ROUNDS}")
                    self._run(commands[name], entries[name])
        return entries

    def _run(self, command: Sequence[str], entry: Entry) -> None:
        try:
            answer, peak = run(command)
        except QavpError as error:
            entry.skipped, entry.failed = str(error), not isinstance(error, UnavailableError)
            self.steps.say(entry.skipped)
        else:
            entry.runs.append(
                Run(
                    load_s=answer["load_s"],
                    timings=answer["timings"],
                    peak_rss_bytes=peak["peak_rss_bytes"],
                    peak_anonymous_bytes=peak["peak_anonymous_bytes"],
                    resident_after_load=answer["resident_after_load"],
                    details=answer["details"],
                )
            )

    def _prepare(self, shape: str, name: Contestant, entry: Entry) -> list[str]:
        """Makes what a contestant runs on, where it is not there yet, and returns its command."""
        task: dict[str, Any] = {"tokens": ANSWER_TOKENS, "threads": self.threads}
        task |= {"repeats": self.repeats, "seconds": self.seconds}
        if name in (Contestant.LLAMA, Contestant.LLAMA_SHORT):
            llama = self.llama
            if not isinstance(llama, Llama):
                raise llama or UnavailableError("llama.cpp was not installed")
            model = self._gguf(shape, llama)
            entry.weight_bytes = model.stat().st_size
            task |= {"model": str(model), "prompt": entry.prompt_tokens}
            return [str(llama.python), str(FOLDER / "llama_worker.py"), json.dumps(task)]
        bundle = self._bundle(shape, name)
        entry.weight_bytes = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        # Plain ONNX Runtime is none of our engines.
        engine = "" if name in _CONFIGS else "ort-cpu"
        task |= {"bundle": str(bundle), "text": TEXT_TOKENS, "engine": engine, "config": _CONFIGS.get(name, {})}
        task["kv_cache"] = self.kv_cache
        return [sys.executable, str(FOLDER / "latency_worker.py"), json.dumps(task)]

    def _bundle(self, shape: str, name: Contestant) -> Path:
        bundle = bundle_folder(self.work, shape, name)
        if bundle.exists():
            try:
                Manifest.read(bundle)
            except BundleError as error:
                self.steps.say(f"{shape}: {name} is exported again: {error}")
                shutil.rmtree(bundle)
        if not bundle.exists():
            checkpoint = checkpoint_folder(self.work, shape, None)
            if not checkpoint.exists():
                self.steps.say(f"{shape}: write the checkpoint")
                make_checkpoint.main(checkpoint, shape, None)
            self.steps.say(f"{shape}: export {name}")
            # Moves the bundle into its place when it is whole.
            run([*command_line(Tool.OURS, Path(sys.executable), checkpoint, bundle), *EXPORTS[name]])
        if name in _CONFIGS:
            write_last_logits(bundle)
        return bundle

    def _gguf(self, shape: str, llama: Llama) -> Path:
        model = gguf_file(self.work, shape)
        if not model.exists():
            self.steps.say(f"{shape}: write {model.name}")
            unfinished = model.with_suffix(".unfinished")
            task = {"path": str(unfinished), **asdict(make_checkpoint.SHAPES[shape])}
            run([llama.python, FOLDER / "gguf_model.py", json.dumps(task)])
            unfinished.rename(model)
        return model


def prompt_tokens(name: Contestant) -> int:
    """Returns how many tokens of the prompt a contestant's decoder gets."""
    pruned = name in (Contestant.OURS, Contestant.LLAMA_SHORT)
    return TEXT_TOKENS + (math.floor(KEEP * VISION_TOKENS + 0.5) if pruned else VISION_TOKENS)


def bundle_folder(work: Path, shape: str, name: Contestant) -> Path:
    """Returns the folder of a contestant's bundle."""
    return work / f"{shape}-{name}"


def gguf_file(work: Path, shape: str) -> Path:
    """Returns the file of llama.cpp's model."""
    return work / f"{shape}-q4_0.gguf"


def check_memory(shape: str, name: Contestant, available: int) -> None:
    """Checks that a contestant fits.

    Raises:
        UnavailableError: It does not.
    """
    needed = _needed_memory(shape, name)
    if needed > available:
        raise UnavailableError(
            f"skipped: it needs about {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available"
        )


def needed_disk(work: Path, shapes: Sequence[str], names: Sequence[Contestant], memory: int) -> int:
    """Returns how many bytes will be written to `work`, roughly: for what fits in `memory` and is not there yet."""
    total = 0.0
    for shape in shapes:
        fitting = [name for name in names if _needed_memory(shape, name) <= memory]
        missing = [name for name in fitting if name in EXPORTS and not bundle_folder(work, shape, name).exists()]
        if missing and not checkpoint_folder(work, shape, None).exists():
            total += 2 * parameters(shape)
        if {Contestant.LLAMA, Contestant.LLAMA_SHORT} & set(fitting) and not gguf_file(work, shape).exists():
            missing.append(Contestant.LLAMA)
        total += sum(DISK[name] for name in missing) * parameters(shape)
    return int(total)


def _needed_memory(shape: str, name: Contestant) -> float:
    return MEMORY[name] * parameters(shape)


def cmake_arguments(cpu_flags: str) -> str:
    """Returns how llama.cpp is built: for this very processor, but without AMX.

    Its AMX kernels crashed with 0.3.36. GGML_AMX_INT8=OFF alone does not help there: beside GGML_NATIVE=ON it goes by
    what the compiler finds in the processor.
    """
    arguments = "-DGGML_NATIVE=ON"
    if "amx_int8" not in cpu_flags.split():
        return arguments
    compiler = "-mno-amx-int8"
    return f"{arguments} -DGGML_AMX_INT8=OFF -DCMAKE_C_FLAGS={compiler} -DCMAKE_CXX_FLAGS={compiler}"


def install_llama(work: Path, wheel: Path | None) -> Llama:
    """Installs llama-cpp-python, from a wheel or built here, and gguf into an environment of their own.

    Raises:
        UnavailableError: It cannot be built or installed.
    """
    package, gguf = LLAMA_PACKAGES
    if wheel is not None:
        python = install(work / "llama-wheel", [wheel.resolve(), gguf])
        return Llama(python, f"the given wheel {wheel.name}")
    arguments = cmake_arguments(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    # A wheel in pip's cache may have been built with other arguments.
    python = install(work / "llama", ["--no-cache-dir", package, gguf], {"CMAKE_ARGS": arguments})
    return Llama(python, f"{package}, CMAKE_ARGS={arguments!r}")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    large: Annotated[bool, typer.Option("--large", help=f"Measure {LARGE} too.")] = False,
    only: Annotated[list[Contestant] | None, typer.Option(help="Measure this contestant; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Fewest runs that count, in each of two processes.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="Least time that they take: quick ones are more.")] = 15.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each; default: as many as cores.")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="Keys and values of our engine: float32 or int8.")] = None,
    llama_wheel: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A wheel of llama-cpp-python, not to build one.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, bundles, environments, which stay there for reuse.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measures vision stage, prefill, time to first token, time per token and memory, and prints one table."""
    names = [name for name in Contestant if not only or name in only]
    shapes = [SMALL, LARGE] if large else [SMALL]
    steps = Steps(Console(stderr=True), time.perf_counter())
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpu_latency-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        check_disk(folder, needed_disk(folder, shapes, names, available_memory()), steps)
        llama: Llama | UnavailableError | None = None
        if Contestant.LLAMA in names or Contestant.LLAMA_SHORT in names:
            steps.say("install llama.cpp")
            try:
                llama = install_llama(folder, llama_wheel)
            except UnavailableError as error:
                llama = error
        bench = Bench(folder, threads or len(os.sched_getaffinity(0)), repeats, seconds, kv_cache, llama, steps)
        details = _details(bench)
        results: dict[str, Mapping[Contestant, Entry]] = {}
        for shape in shapes:
            results[shape] = bench.measure(shape, names)
            if json_file is not None:
                json_file.write_text(json.dumps(report(results, SMALL, details), indent=2) + "\n", encoding="utf-8")
    print_table(results, Console(width=170), _heading(results, bench))
    for entries in results.values():
        for name, entry in entries.items():
            if entry.failed:
                raise QavpError(f"{TITLES[name]} failed: {entry.skipped}")


def _details(bench: Bench) -> dict[str, Any]:
    pythons = {"ours": Path(sys.executable)}
    if isinstance(bench.llama, Llama):
        pythons["llamacpp"] = bench.llama.python
    return {
        "command": sys.argv,
        "threads": bench.threads,
        "repeats": bench.repeats,
        "seconds": bench.seconds,
        "kv_cache": bench.kv_cache,
        "rounds": ROUNDS,
        "answer_tokens": ANSWER_TOKENS,
        "llama_build": bench.llama.build if isinstance(bench.llama, Llama) else None,
        "versions": {name: versions(python) for name, python in pythons.items()},
    }


def _heading(results: Mapping[str, Mapping[Contestant, Entry]], bench: Bench) -> list[str]:
    runs = f"{bench.repeats} runs or {bench.seconds:g} s, whichever is more"
    lines = [f"{bench.threads} threads; {runs}, in each of {ROUNDS} processes"]
    if isinstance(bench.llama, Llama):
        made = [run for entries in results.values() for entry in entries.values() for run in entry.runs]
        said = next((run.details["system_info"] for run in made if "system_info" in run.details), "")
        lines.append(
            f"llama.cpp: {bench.llama.build}; {said} Output projection in Q6_K, as its Q4_0 quantization does."
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(run_command(app, "cpu_latency"))
