"""Builds an engine with TensorRT-RTX and reports what is in it, in a process of its own; needs no GPU.

Run as a script (`rtx.py MODEL SM120`) it writes a `Build` as JSON. Its libraries must not share a process with ONNX
Runtime's, so nothing here may be imported for anything but `build_engine`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gemm:
    """A matrix product of the engine.

    Attributes:
        nodes: The ONNX nodes that it computes.
        operands: Data types of its run-time inputs.
        constants: Data types of what the engine holds for it.
    """

    nodes: list[str]
    operands: list[str]
    constants: list[str]


@dataclass(frozen=True)
class Build:
    """What TensorRT-RTX made of a model: the engine's size, 0 if there is none, its products, and error messages."""

    engine_bytes: int
    gemms: list[Gemm]
    errors: list[str]


def build_engine(model: Path, capability: str) -> Build:
    """Parses a decoder and builds its engine for a compute capability such as `SM120`, in a new process."""
    command = [sys.executable, str(Path(__file__)), str(model), capability]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        raise RuntimeError(f"the builder ended with {result.returncode}: {result.stderr[-2000:]}")
    report = json.loads(result.stdout)
    return Build(report["engine_bytes"], [Gemm(**gemm) for gemm in report["gemms"]], report["errors"])


def _build(model: str, capability: str) -> Build:
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            (self.errors if severity <= trt.ILogger.ERROR else self.lines).extend(message.splitlines())

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(model):
        return Build(0, [], log.errors)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            # There is no dedicated kernel for float32.
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    # With this, the log lists the engine's layers; the engine inspector would need a GPU.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(_profile(builder, network))
    engine = builder.build_serialized_network(network, config)
    gemms = [_gemm(line) for line in log.lines if line.startswith("Name: ") and ", LayerType: gemm," in line]
    return Build(0 if engine is None else engine.nbytes, gemms, log.errors)


def _profile(builder: Any, network: Any) -> Any:
    """Prompts of 1 to 16 tokens, one or two at a time, on a cache of 0 to 32."""
    tokens, past = (1, 8, 16), (0, 16, 32)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shapes = []
        for case, batch in enumerate((1, 1, 2)):
            length = {"attention_mask": past[case] + tokens[case]}.get(value.name, tokens[case])
            dynamic = [batch, past[case] if value.name.startswith("past") else length]
            shapes.append([dynamic.pop(0) if size < 0 else size for size in value.shape])
        profile.set_shape(value.name, *shapes)
    return profile


def _gemm(line: str) -> Gemm:
    inputs, rest = line.split(", Constants: [", 1)
    constants, rest = rest.split(", Outputs: [", 1)
    types = [re.findall(r"Datatype: (\w+)", part) for part in (inputs, constants)]
    return Gemm(re.findall(r"\[ONNX Layer: ([^\]]+)\]", rest), *types)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_build(sys.argv[1], sys.argv[2]))))
