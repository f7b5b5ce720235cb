"""`qavp-inspect`: shows what a bundle is made of, which vision tokens it keeps of an image, and why."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qavp_export import plots
from qavp_export.cli.common import run_command, with_options
from qavp_export.cli.report import print_summary, summary
from qavp_export.engines import EngineOptions
from qavp_export.errors import InputError
from qavp_export.inspect.drawing import draw_graph, graph_tree
from qavp_export.inspect.graph import overview
from qavp_export.inspect.look import Look, Question, ask, look
from qavp_export.inspect.picture import Answers, draw_selection
from qavp_export.manifest import Manifest

_HELP = """Show a bundle: a summary of it; with --graph what its graphs are made of; with --image which vision tokens it
keeps, with heat maps of the scores that they were chosen by.

Example: qavp-inspect bundle --image photo.jpg --prompt "What is in the picture?" --against dense -o tokens.png
"""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class InspectOptions:
    """A command line of `qavp-inspect`; what each option is, its help says."""

    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that qavp-export wrote.")]
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="Picture of this image's kept tokens and scores.")
    ] = None
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Also the answer to this question about the image.")
    ] = None
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DIR", help="Also the answer of this bundle, for example the dense one."),
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
    ] = None
    graph: Annotated[bool, typer.Option("--graph", help="Overview of the graphs: printed, or drawn with -o.")] = False
    numbers: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what is shown as JSON: kept indices, scores.")
    ] = None
    keep: Annotated[
        float | None, typer.Option(help="Share of vision tokens that survives, within the bundle's range.")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the prompt holds one image token.")] = False
    engine: Annotated[str, typer.Option(help="What runs the bundles for answers.")] = "ort-cpu"
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None
    # Read by run_command.
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    def question(self) -> Question:
        """Returns what the bundle is asked."""
        return Question(self.prompt, not self.raw, self.keep, self.max_new_tokens)


@app.command(help=_HELP)
@with_options(InspectOptions)
def inspect(options: InspectOptions) -> None:  # noqa: D103
    _check(options)
    if options.image is not None:
        engine_options = EngineOptions(threads=options.threads)
        seen = look(options.bundle, options.image, options.question(), engine_options)
        _show_selection(seen, _ask(options, options.image, engine_options), options.output, options.numbers)
    elif options.graph:
        _show_graph(options.bundle, options.output, options.numbers)
    else:
        _show_summary(options.bundle, options.numbers)


def _check(options: InspectOptions) -> None:
    """Checks flags against one another before anything is loaded."""
    if options.image is None and (options.prompt is not None or options.against is not None):
        raise InputError("--prompt and --against are about an image; give --image FILE")
    if options.against is not None and options.prompt is None:
        raise InputError("--against compares answers; give --prompt TEXT")
    if options.image is not None and options.graph:
        raise InputError("--image and --graph are two pictures; ask for one at a time")
    if options.image is not None and options.output is None and options.numbers is None:
        raise InputError("--image draws a picture; say where to with -o FILE.png, or --json FILE for the numbers alone")
    if options.output is not None and options.image is None and not options.graph:
        raise InputError("-o writes a picture; give --image FILE for one of the kept tokens, or --graph")
    if options.output is not None:
        plots.check_format(options.output)
        plots.require_matplotlib("figure")


def _ask(options: InspectOptions, image: Path, engine_options: EngineOptions) -> Answers | None:
    """Asks the question, if there is one, of the bundle and of the one that it is compared with."""
    if options.prompt is None:
        return None
    before = None
    if options.against is not None:
        # A share is for this bundle; the other keeps what it keeps.
        question = dataclasses.replace(options.question(), keep=None)
        before = ask(options.against, image, question, options.engine, engine_options)
    here = ask(options.bundle, image, options.question(), options.engine, engine_options)
    return Answers(options.prompt, here, before)


def _show_selection(seen: Look, answers: Answers | None, output: Path | None, numbers: Path | None) -> None:
    console = Console()
    kept = sum(len(unit.kept) for unit in seen.selections)
    console.print(f"{kept} of {sum(len(unit.score) for unit in seen.selections)} vision tokens kept", highlight=False)
    facts: dict[str, Any] = seen.to_dict()
    if answers is not None:
        facts |= {"question": answers.question, "answer": answers.here.to_dict()}
        facts |= {} if answers.before is None else {"answer_before": answers.before.to_dict()}
        for line in answers.lines(seen):
            console.print(line, markup=False, highlight=False)
    if output is not None:
        plots.save(draw_selection(seen, answers), output)
    _write_json(facts, numbers)


def _show_graph(bundle: Path, output: Path | None, numbers: Path | None) -> None:
    manifest = Manifest.read(bundle)
    parts = overview(bundle, manifest)
    if output is not None:
        title = f"{manifest.source} ({manifest.family}), recipe {manifest.recipe.get('name')}"
        plots.save(draw_graph(parts, title), output)
    else:
        for part in parts:
            Console().print(graph_tree(part))
    _write_json({"components": [part.to_dict() for part in parts]}, numbers)


def _show_summary(bundle: Path, numbers: Path | None) -> None:
    manifest = Manifest.read(bundle)
    name = manifest.recipe.get("name")
    print_summary(manifest, bundle, f"{manifest.source}: family {manifest.family}, recipe {name}")
    written = ", ".join(f"{library} {version}" for library, version in manifest.versions.items())
    Console().print(f"written by {written}", highlight=False)
    _write_json(summary(manifest, bundle) | {"versions": manifest.versions}, numbers)


def _write_json(facts: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        plots.write_bytes(path, (json.dumps(facts, ensure_ascii=False) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `qavp-inspect`; returns the exit code."""
    # transformers remarks on stderr that torch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return run_command(app, "qavp-inspect", argv)


if __name__ == "__main__":
    sys.exit(main())
