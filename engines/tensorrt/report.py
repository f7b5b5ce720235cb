"""Polygraphy's capability report: what of a graph TensorRT's parser supports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qavp_export.engines.tensorrt.keys import TENSORRT_RTX
from qavp_export.errors import QavpError, UnavailableError

# Polygraphy's own switch.
_USE_RTX = "POLYGRAPHY_USE_TENSORRT_RTX"
# What its script does, which need not be on the path.
_POLYGRAPHY = "import sys; from polygraphy.tools import main; sys.exit(main())"


def check_report() -> None:
    """Checks that Polygraphy is there.

    Raises:
        UnavailableError: It is not installed.
    """
    if importlib.util.find_spec("polygraphy") is None:
        raise UnavailableError("--capability-report needs Polygraphy: pip install polygraphy")


def write_report(model: Path, target: Path, flavour: str) -> None:
    """Writes the report of one lowered graph.

    Args:
        model: The ONNX file.
        target: Where the report goes.
        flavour: `tensorrt` or `tensorrt-rtx`.

    Raises:
        QavpError: Polygraphy failed.
    """
    environment = {**os.environ, _USE_RTX: "1" if flavour == TENSORRT_RTX else "0"}
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        parts = Path(folder) / "parts"
        command = [sys.executable, "-P", "-c", _POLYGRAPHY, "inspect", "capability", str(model), "-o", str(parts)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode:
            said = (result.stderr or result.stdout).strip().splitlines()
            raise QavpError(f"polygraphy inspect capability ended with {result.returncode} ({' '.join(said[-1:])})")
        results = parts / "results.txt"
        table = results.read_text(encoding="utf-8") if results.is_file() else ""
    # No machine's paths in a bundle.
    text = (result.stdout + table).replace(str(model), model.name)
    target.write_text(text, encoding="utf-8")
