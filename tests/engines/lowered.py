"""Writes canonical graphs as a bundle has them, and opens lowered ones as an engine does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qavp_export.engines import EngineOptions
from qavp_export.engines.ort.lowering.weights import Lowered
from qavp_export.engines.ort.session import Graph
from qavp_export.engines.ort.weights import read_weights
from qavp_export.weight_file import WeightFile

Array = npt.NDArray[Any]

OPTIONS = EngineOptions(threads=1)
# The canonical graph, operator for operator.
AS_IT_IS = EngineOptions(threads=1, graph_optimization="disable")


def write_canonical(model: ir.Model, bundle: Path, component: str = "decoder") -> ir.Model:
    """Writes a graph with its weights beside it, and returns it as a lowering reads it."""
    path = bundle / component / "model.onnx"
    path.parent.mkdir(parents=True)
    WeightFile(path, model, {}).finish(lambda *_: None)
    return ir.load(path)


def open_canonical(bundle: Path, component: str = "decoder", options: EngineOptions = AS_IT_IS) -> Graph:
    """Opens what `write_canonical` wrote."""
    path = bundle / component / "model.onnx"
    model = ir.load(path)
    return Graph(component, path, options, *_names(model))


def open_lowered(lowered: Lowered, bundle: Path, name: str) -> Graph:
    """Writes a lowered graph and opens it with weights made of the bundle's."""
    path = bundle / f"{name}.onnx"
    ir.save(lowered.model, path)
    weights = read_weights(bundle, lowered.weights, threads=1)
    return Graph(name, path, OPTIONS, *_names(lowered.model), weights)


def _names(model: ir.Model) -> tuple[list[str], list[str]]:
    return [str(value.name) for value in model.graph.inputs], [str(value.name) for value in model.graph.outputs]


def run(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Runs a graph once."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C")) for name, array in inputs.items()}
    return {name: value.numpy() for name, value in graph.run(values).items()}


def nodes_of(model: ir.Model, op_type: str) -> Sequence[ir.Node]:
    """Returns the nodes of an operator."""
    return [node for node in model.graph if node.op_type == op_type]


def codes_by_value(model: ir.Model) -> dict[str, str]:
    """Returns the codes of each value that a lowered graph quantizes, by name."""
    codes = {
        str(node.inputs[0].name): str(node.outputs[0].name)
        for node in nodes_of(model, "QuantizeLinear")
        if node.inputs[0]
    }
    for node in nodes_of(model, "Round"):  # the CUDA provider's
        x = _producer(_producer(node)).inputs[0]
        (flat,) = node.outputs[0].consumers()
        (cast,) = flat.outputs[0].consumers()
        codes[str(x and x.name)] = str(cast.outputs[0].name)
    return codes


def _producer(node: ir.Node) -> ir.Node:
    made = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert made is not None
    return made
