"""Checks and times everything that needs a GPU, in one run of some minutes.

python benchmarks/gpu_check.py --bundle BUNDLE --json gpu_check.json

Every kernel is compared with the NumPy reference on fresh random data and timed with CUDA events, medians over replays
of CUDA graphs whose launches read different inputs; then the GPU engines of the given bundles run end to end. The table
comes last. Goals that are missed are marked and do not change the exit code; wrong results do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu_compile import Binary, compile_all, read_binaries, spec_key, write_binaries
from gpu_engines import EngineResults
from gpu_kernels import KernelBench, kernel_specs
from gpu_matmul import MatmulBench, matmul_specs
from gpu_plugins import PluginBench
from gpu_report import Check, Report, Timing, print_report
from gpu_select import SelectBench, select_specs
from gpu_timing import Kernels
from rich.console import Console
from rich.progress import track

from qavp_export.cli.common import run_command
from qavp_export.engines.cuda.driver import Device
from qavp_export.errors import ParityError

_SAID = Console(stderr=True)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[
        list[Path] | None, typer.Option(exists=True, file_okay=False, help="Run this bundle's engines; repeatable.")
    ] = None,
    demo_bundle: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A bundle of the demo model, whose answers are compared too."),
    ] = None,
    kernels: Annotated[bool, typer.Option(help="Check and time the kernels.")] = True,
    compile_file: Annotated[
        Path | None,
        typer.Option(
            "--compile", help="Only compile the kernels, on a machine that needs no GPU, and write them here."
        ),
    ] = None,
    capability: Annotated[int, typer.Option(help="Compute capability that --compile compiles for.")] = 90,
    compiled: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Take kernels that --compile wrote.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Time every tiling of every kernel.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the random data; default: another one each time.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Checks the GPU kernels and engines, and prints one table."""
    if compile_file is not None:
        _compile(compile_file, capability, tune=tune)
        return
    ready = read_binaries(compiled) if compiled else {}
    device = Device.open()
    seed = time.time_ns() % (1 << 31) if seed is None else seed
    report = Report(_describe(device, seed), [], [], {})
    # Written as it grows: a run that is cut short leaves what it found.
    for part in _parts(device, ready, seed, tune=tune) if kernels else ():
        results = list(part)
        checks = [result for result in results if isinstance(result, Check)]
        timings = [result for result in results if isinstance(result, Timing)]
        report = Report(report.device, [*report.checks, *checks], [*report.timings, *timings], {})
        _SAID.print(f"{len(report.checks)} checks, {len(report.timings)} times")
        _write(report, json_file)
    engines = EngineResults()
    for folder in [*([demo_bundle] if demo_bundle else []), *(bundle or [])]:
        _SAID.print(f"engines of {folder}")
        engines.measure(folder, answers=folder == demo_bundle)
    report = Report(
        report.device, [*report.checks, *engines.checks], [*report.timings, *engines.timings], engines.missing
    )
    _write(report, json_file)
    print_report(report, Console(width=150))
    if not report.passed:
        raise ParityError("results differ from the reference's; the lines marked WRONG say which")


def _compile(file: Path, capability: int, *, tune: bool) -> None:
    wanted = [*kernel_specs(tune=tune), *select_specs(), *matmul_specs(capability, tune=tune)]
    specs = list({spec_key(spec): spec for spec in wanted}.values())
    write_binaries(file, specs, track(compile_all(specs, capability), "compile", len(specs), console=_SAID))


def _parts(device: Device, ready: Mapping[str, Binary], seed: int, *, tune: bool) -> Iterator[Iterable[Check | Timing]]:
    """Yields what there is to check and to time, one kernel at a time."""
    kernels = Kernels(device)
    wanted = [*kernel_specs(tune=tune), *select_specs(), *matmul_specs(kernels.capability, tune=tune)]
    kernels.compile(wanted, ready)
    bench, products = KernelBench(kernels, seed, tune=tune), MatmulBench(kernels, seed, tune=tune)
    selection = SelectBench(kernels, seed)
    yield bench.check_scores()
    yield bench.check_quantizers()
    yield selection.check()
    yield products.check()
    yield bench.time_scores()
    yield selection.time()
    yield bench.time_quantizers()
    yield products.time()
    for capability in sorted({80, kernels.capability}):
        yield PluginBench(device, capability, seed).check()


def _describe(device: Device, seed: int) -> dict[str, Any]:
    driver = f"CUDA {device.driver_version // 1000}.{device.driver_version % 1000 // 10}"
    return {"name": device.name, "driver": driver, "multiprocessors": device.sm_count, "seed": seed}


def _write(report: Report, file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(run_command(app, "gpu_check"))
