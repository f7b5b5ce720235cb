"""`qavp-run`: asks a bundle a question about images."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from qavp_export.cli.common import run_command, with_options
from qavp_export.engines import EngineOptions
from qavp_export.runtime import Prepared, QavpModel, Sampling

_HELP = """Ask a bundle a question about one or several images; the answer streams to stdout.

Example: qavp-run bundle --image photo.jpg --prompt "What is in the picture?"
"""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class RunOptions:
    """A command line of `qavp-run`; what each option is, its help says."""

    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that qavp-export wrote.")]
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The question.")]
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="An image; repeat for several.")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Sample from the tokens that reach this probability.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None
    keep: Annotated[
        float | None,
        typer.Option(help="Share of vision tokens that survives, within the bundle's range; else its default."),
    ] = None
    engine: Annotated[
        str, typer.Option(help="What runs the bundle: ort-cpu, ort-cuda, ort-reference, tensorrt or tensorrt-rtx.")
    ] = "ort-cpu"
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None
    vision: Annotated[
        str | None, typer.Option(help="Vision tower of engine ort-cpu: w8a8 or fp32.", show_default="w8a8")
    ] = None
    cpu_memory: Annotated[
        str, typer.Option(help="low: weights of engine ort-cpu stay packed for prompts too, which is slower.")
    ] = "high"
    kv_cache: Annotated[
        str | None,
        typer.Option(help="Keys and values of engine ort-cpu: float32 or int8.", show_default="float32"),
    ] = None
    spinning: Annotated[
        bool, typer.Option("--spinning/--no-spinning", help="Whether threads wait for work by spinning.")
    ] = True
    memory_arena: Annotated[
        bool,
        typer.Option("--memory-arena/--no-memory-arena", help="Whether memory for activations is kept between runs."),
    ] = True
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: the prompt holds one image token for each image.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with answer, tokens and timings in seconds.")
    ] = False
    # Read by run_command.
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    def sampling(self) -> Sampling:
        """Returns how tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)

    def engine_options(self) -> EngineOptions:
        """Returns how the engine opens the bundle."""
        return EngineOptions(
            threads=self.threads,
            vision=self.vision,
            cpu_memory=self.cpu_memory,
            kv_cache=self.kv_cache,
            spinning=self.spinning,
            memory_arena=self.memory_arena,
        )


@dataclass
class _Answer:
    """An answer as it grows, with the time of each token."""

    started: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def timings(self, load_seconds: float) -> dict[str, float | None]:
        """Seconds: to the first token from before the images are read, and for each token after it."""
        after_first = self.times[-1] - self.times[0]
        return {
            "load": load_seconds,
            "time_to_first_token": self.times[0] - self.started,
            "time_per_output_token": after_first / (len(self.times) - 1) if len(self.times) > 1 else None,
            "total": self.times[-1] - self.started,
        }


@app.command(help=_HELP)
@with_options(RunOptions)
def run(options: RunOptions) -> None:  # noqa: D103
    sampling = options.sampling()
    started = time.perf_counter()
    model = QavpModel.from_bundle(options.bundle, options.engine, options.engine_options())
    load_seconds = time.perf_counter() - started
    answer = _Answer()
    prepared = model.prepare(options.image, options.prompt, chat_template=not options.raw, keep=options.keep)
    for piece in _pieces(model, model.generate_steps(prepared, sampling, options.max_new_tokens), answer):
        answer.text += piece
        if not options.as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if options.as_json:
        sys.stdout.write(json.dumps(_result(answer, prepared, options.engine, load_seconds), ensure_ascii=False))
    sys.stdout.write("\n")


def _result(answer: _Answer, prepared: Prepared, engine: str, load_seconds: float) -> dict[str, Any]:
    """Returns an answer as JSON values."""
    return {
        "answer": answer.text,
        "tokens": {
            "prompt": int(prepared.attention_mask.sum()),
            "vision": sum(len(indices) for indices in prepared.kept_indices),
            "vision_before_pruning": sum(prepared.unpruned_tokens),
            "answer": len(answer.tokens),
        },
        "token_ids": answer.tokens,
        "seconds": answer.timings(load_seconds),
        "engine": engine,
    }


def _pieces(model: QavpModel, steps: Iterator[list[int | None]], answer: _Answer) -> Iterator[str]:
    stream = model.text_stream()
    for (token,) in steps:
        if token is None:
            continue
        answer.times.append(time.perf_counter())
        answer.tokens.append(token)
        yield stream.push(token)
    yield stream.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `qavp-run`; returns the exit code."""
    # transformers remarks on stderr that torch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return run_command(app, "qavp-run", argv)
