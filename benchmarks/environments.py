"""Virtual environments of their own for the programs that a benchmark compares."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from qavp_export.errors import UnavailableError

REPOSITORY = Path(__file__).parents[1]
# What a wheel of the project is built of.
_SOURCES = ("pyproject.toml", "README.md", "qavp_export", "passes", "engines", "examples/shapes_vqa/samples")
_LIST_VERSIONS = """
import importlib.metadata, json
print(json.dumps({found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}))
"""


def install(
    folder: Path, requirements: Sequence[str | Path], variables: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """Installs packages, at the versions of constraints.txt, into a virtual environment that is made where missing.

    Args:
        folder: The environment's folder.
        requirements: What pip shall install; options of pip may be among them.
        variables: Environment variables to set for pip, on top of this process's own.

    Returns:
        The environment's Python.

    Raises:
        UnavailableError: pip could not install them.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", folder], f"make the environment {folder}")
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--constraint", REPOSITORY / "constraints.txt"]
    _run([*pip, *requirements], f"install {', '.join(map(str, requirements))} into {folder}", variables)
    return python


def copy_project(folder: Path) -> Path:
    """Copies what the project is built of, replacing an earlier copy, and returns the copy's folder.

    setuptools builds in a folder of the source tree and ships what an earlier build left there: a copy has none.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in _SOURCES:
        source, target = REPOSITORY / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def versions(python: Path) -> dict[str, str]:
    """Returns the versions of all packages of an environment."""
    found: dict[str, str] = json.loads(_run([python, "-c", _LIST_VERSIONS], f"list the packages of {python}"))
    return dict(sorted(found.items()))


def _run(command: Sequence[str | Path], purpose: str, variables: Mapping[str, str] = MappingProxyType({})) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UnavailableError(f"could not {purpose}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout
