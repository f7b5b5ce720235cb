"""Graphs with the functions of the TensorRT lowering: looked into, and shown to TensorRT-RTX's parser."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

# Its libraries must not share a process with ONNX Runtime's.
_PARSE = """
import sys
import tensorrt_rtx as trt
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
sys.exit(not trt.OnnxParser(network, log).parse_from_file(sys.argv[1]))
"""

needs_parser = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="TensorRT-RTX is published for Linux x86_64 only"
)


def check_parser_takes(model: ir.Model, folder: Path) -> None:
    """Checks that TensorRT-RTX's parser, which has no plugins, takes a model: by its functions' bodies."""
    path = folder / "model.onnx"
    ir.save(model, path)
    command = [sys.executable, "-c", _PARSE, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def tap(model: ir.Model, value: ir.Value | None, name: str) -> None:
    assert value is not None
    value.name = name
    model.graph.outputs.append(value)
