"""`optimum-cli export qavp`: the options of `qavp-export`, with the bundle's folder as an argument."""

from __future__ import annotations

import argparse
import functools
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo  # type: ignore[import-untyped]

_PROG = "optimum-cli export qavp"

OutputArgument = Annotated[Path | None, typer.Argument(metavar="OUT", help="Bundle folder.", show_default=False)]


class QavpExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands everything that follows `qavp` to the command line of `qavp-export`."""

    COMMAND = CommandInfo(name="qavp", help="Export a LLaVA-family model with pruned vision tokens and W4A4 decoder.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Takes all arguments as they are, `--help` among them."""
        # argparse reads options before a remainder can take them; without prefix there are no options.
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Runs the export and exits with the code that `qavp-export` would exit with."""
        # Imported here: optimum-cli imports this module whatever its command is.
        from qavp_export.cli.common import run_command

        raise SystemExit(run_command(export_app(), _PROG, self.args.arguments))


def export_app() -> typer.Typer:
    """Returns `qavp-export` with `--output` turned into the argument OUT, as Optimum's exporters take it."""
    from qavp_export.cli.common import declare
    from qavp_export.cli.export import export_command

    @functools.wraps(export_command)
    def command(**options: Any) -> None:
        export_command(**options)

    signature = inspect.signature(export_command, eval_str=True)
    output = signature.parameters["output"].replace(annotation=OutputArgument)
    parameters = [output if name == output.name else value for name, value in signature.parameters.items()]
    declare(command, signature.replace(parameters=parameters))
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=f"Example: {_PROG} --model llava-1.5-7b --keep 0.125 llava-w4a4")(command)
    return app
