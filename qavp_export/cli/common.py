"""What both commands share: errors as one line on stderr, with the exit code that says what kind it was."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

import typer

from qavp_export.errors import QavpError

Options = TypeVar("Options")

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_TERMINATED = 143  # 128 + SIGTERM


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised as an exception so that it cleans up as Ctrl-C does."""


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def with_options(
    options: Callable[..., Options],
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Makes a command, which typer reads options from, of a function that takes all of them as one object.

    Args:
        options: A dataclass with a field for each option, annotated as typer asks.
    """

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(options(**values))

        declare(command, inspect.signature(options, eval_str=True).replace(return_annotation=None))
        return command

    return decorate


def declare(command: Callable[..., None], signature: inspect.Signature) -> None:
    """Says what options a command takes by keyword; typer builds it from what is set here.

    Args:
        command: The command; changed in place.
        signature: Its parameters, annotated as typer asks.
    """
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: value.annotation for name, value in signature.parameters.items()}


def run_command(app: typer.Typer, prog: str, argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    A `QavpError` exits with its own code, a wrong flag with 2, Ctrl-C with 130, SIGTERM with 143, anything else
    with 1; each with one line on stderr. `--debug` among the arguments adds the traceback of an error.

    Args:
        app: An app with one command.
        prog: The command's name in help and messages.
        argv: The arguments; None: the process's own.

    Returns:
        The exit code.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        return _run(app, prog, args)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _run(app: typer.Typer, prog: str, args: list[str]) -> int:
    try:
        # Not `app()`: typer would print usage errors in a box and swallow Ctrl-C.
        with typer.main.get_command(app).make_context(prog, args.copy()) as context:
            context.command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt as stop:
        return _interrupted(stop)
    except BrokenPipeError:
        # The reader of the output has left. The interpreter flushes stdout once more on exit: let it succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        # Cleaning up after an interrupt may fail by itself, in a library: the interrupt is what happened.
        behind = _interrupt_behind(error)
        return _interrupted(behind) if behind is not None else _report(error, prog, debug="--debug" in args)
    return 0


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    cause = error.__context__
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__
    return cause


def _interrupted(stop: KeyboardInterrupt) -> int:
    _print_line("interrupted")
    return EXIT_TERMINATED if isinstance(stop, _Terminated) else EXIT_INTERRUPTED


def _report(error: Exception, prog: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if isinstance(error, QavpError):
        _print_line(f"error: {error}")
        return error.exit_code
    # Usage errors. typer carries its own copy of click, so their class has no one name to catch.
    format_message = getattr(error, "format_message", None)
    if callable(format_message):
        _print_line(f"error: {str(format_message()).rstrip('.')}; see {prog} --help")
        return EXIT_USAGE
    hint = "" if debug else "; --debug shows where"
    _print_line(f"error: unexpected {type(error).__name__}: {error}{hint}")
    return EXIT_FAILURE


def _print_line(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)  # noqa: T201
