"""Graphs with the functions of the TensorRT lowering: looked into, and shown to TensorRT-RTX's parser."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from qavp_export.numerics.diverse import Diversity
from qavp_export.passes import SelectGather
from tests.engines.lowered import nodes_of
from tests.passes.graphs import graph

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


def attended(select: Diversity, tokens: int, *, keep_input: bool = False) -> ir.Model:
    """A vision encoder of nothing but an `Attention` node named `/attn` and a diverse selection behind it.

    It chooses from 23 tokens: inputs are `x [B,2,23,16]` and `score [B,23]`.
    """
    signature = "(float[B,2,23,16] x, float[B,23] score) => (float[B,23,32] image_features)"
    body = """
      shape = Constant <value_ints: ints = [0, 23, 32]> ()
      heads = Attention (x, x, x)
      by_token = Transpose <perm: ints = [0, 2, 1, 3]> (heads)
      image_features = Reshape (by_token, shape)
    """
    model = graph(signature, body)
    (attention,) = nodes_of(model, "Attention")
    attention.name = "/attn"
    SelectGather(score="score", tokens=None if keep_input else tokens, keep_input=keep_input, select=select)(model)
    return model


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
