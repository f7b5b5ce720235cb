"""Runs a decoder's graph from one linear layer's input to the next, with the weights of a few layers in memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
from onnx_ir.convenience import extract

from qavp_export.engines import EngineOptions
from qavp_export.engines.ort.session import session_options
from qavp_export.passes import by_output_channel
from qavp_export.passes._linear import is_linear

Array = npt.NDArray[Any]


class Walk:
    """A forward pass over a set of prompts that stops where it is told.

    Each step runs the part of the graph that lies between what is known and what is wanted, for every prompt, and keeps
    on disk what later parts will read. Weights are read when their part runs: a layer may be changed until then. In a
    folder that an earlier walk over the same graph and prompts has left, it goes on where that one stopped.

    Args:
        model: The graph; its initializers may be lazy.
        feeds: The graph's inputs by name, one mapping for each prompt.
        folder: A folder for values in between: empty, or an earlier walk's.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Mapping[str, Array]], folder: Path) -> None:
        self._model = model
        self._prompts = len(feeds)
        self._folder = folder
        self._known: dict[ir.Value, int] = {}
        self._done: set[ir.Node] = set()
        self._numbered = 0
        self._weights: dict[ir.Value, npt.NDArray[np.float32]] = {}
        self._state = folder / "state.json"
        if self._state.is_file():
            self._restore()
            return
        for value in model.graph.inputs:
            if str(value.name) in feeds[0]:
                self._known[value] = self._new_number()
                for prompt, feed in enumerate(feeds):
                    np.save(self._file(value, prompt), feed[str(value.name)])
        self._remember()

    def advance(self, wanted: Collection[ir.Value]) -> None:
        """Computes values for every prompt; `read` gives them until the walk has passed all that read them."""
        for node in self._between(wanted)[0]:
            if _is_float_linear(node) and node.inputs[0] in self._known:
                self.multiply(node)
        nodes, sources = self._between(wanted)
        if not nodes:
            return
        self._done |= nodes
        computed = [value for node in self._model.graph if node in nodes for value in node.outputs]
        kept = [value for value in computed if value in wanted or any(user not in self._done for user in _users(value))]
        session, weights = self._session(sources, kept)
        names = [str(value.name) for value in kept]
        for value in kept:
            self._known[value] = self._new_number()
        for prompt in range(self._prompts):
            feeds = {str(value.name): np.load(self._file(value, prompt)) for value in sources}
            for value, array in zip(kept, session.run(names, feeds | weights), strict=True):
                np.save(self._file(value, prompt), array)
        self._remember()
        self._forget(wanted)

    def passed(self, value: ir.Value) -> bool:
        """Whether all that reads a value has been computed, so that the value is gone."""
        return value not in self._known and value.producer() in self._done

    def multiply(self, node: ir.Node) -> None:
        """Computes the output of a linear layer with a float weight whose input is known, and lets go of the weight."""
        x, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        if x is None or weight is None:
            raise TypeError(f"{node.name} lacks an input")
        # As it is stored: to turn it for a MatMul would take longer than the product with a few tokens.
        values = self.weight(weight)
        del self._weights[weight]
        self._known[output] = self._new_number()
        for prompt in range(self._prompts):
            inputs = np.load(self._file(x, prompt))
            # As one matrix: for a batch, NumPy would go through the weight once for each of its rows.
            product = inputs.reshape(-1, inputs.shape[-1]) @ values.T
            np.save(self._file(output, prompt), product.reshape(*inputs.shape[:-1], len(values)))
        self._done.add(node)

    def read(self, value: ir.Value) -> Iterator[Array]:
        """Yields a known value, prompt by prompt."""
        for prompt in range(self._prompts):
            yield np.load(self._file(value, prompt))

    def weight(self, weight: ir.Value) -> npt.NDArray[np.float32]:
        """Reads a weight `[K,N]` as `[N,K]` and keeps it until the walk multiplies by it."""
        if weight not in self._weights:
            self._weights[weight] = by_output_channel(weight)
        return self._weights[weight]

    def _between(self, wanted: Collection[ir.Value]) -> tuple[set[ir.Node], list[ir.Value]]:
        """Returns the nodes that lead from known values to wanted ones, and those known values."""
        nodes: set[ir.Node] = set()
        sources: dict[ir.Value, None] = {}
        pending = [value for value in wanted if value not in self._known]
        while pending:
            node = pending.pop().producer()
            if node is None or node in nodes:
                continue
            nodes.add(node)
            for value in node.inputs:
                if value is not None and value in self._known:
                    sources[value] = None
                elif value is not None:
                    pending.append(value)
        return nodes, list(sources)

    def _session(
        self, sources: list[ir.Value], outputs: list[ir.Value]
    ) -> tuple[ort.InferenceSession, dict[str, Array]]:
        """Opens the graph between sources and outputs; returns it with its float weights, which it takes as inputs."""
        graph = extract(self._model.graph, sources, outputs)
        for value, source in zip(graph.inputs, sources, strict=True):
            # Shape inference leaves some values without a type; what was computed has one.
            value.dtype = ir.DataType.from_numpy(next(self.read(source)).dtype)
        weights: dict[str, Array] = {}
        for name, value in list(graph.initializers.items()):
            # As inputs they are not copied into a protobuf first.
            if value.dtype == ir.DataType.FLOAT and value.shape is not None and len(value.shape) == 2:
                graph.initializers.pop(name)
                graph.inputs.append(value)
                weights[name] = self._take(self._model.graph.initializers[name])
                value.const_value = None
        part = ir.Model(graph, ir_version=self._model.ir_version, functions=list(self._model.functions.values()))
        options = session_options(EngineOptions(graph_optimization="disable"))
        return open_part(part, options), weights

    def _take(self, weight: ir.Value) -> Array:
        values = self.weight(weight)
        del self._weights[weight]
        return np.ascontiguousarray(values.T)

    def _forget(self, wanted: Collection[ir.Value]) -> None:
        for value in [value for value in self._known if value not in wanted]:
            if all(user in self._done for user in _users(value)):
                for prompt in range(self._prompts):
                    self._file(value, prompt).unlink(missing_ok=True)
                del self._known[value]

    def _remember(self) -> None:
        """Writes down where the walk is, before files that this place does not need are removed."""
        state = {
            "numbered": self._numbered,
            "known": {str(value.name): number for value, number in self._known.items()},
            "done": [index for index, node in enumerate(self._model.graph) if node in self._done],
        }
        file = self._state.with_suffix(".new")
        file.write_text(json.dumps(state), encoding="utf-8")
        file.replace(self._state)

    def _restore(self) -> None:
        state = json.loads(self._state.read_text(encoding="utf-8"))
        graph = self._model.graph
        values = {str(value.name): value for value in graph.inputs}
        values |= {str(value.name): value for node in graph for value in node.outputs}
        self._numbered = state["numbered"]
        self._known = {values[name]: number for name, number in state["known"].items()}
        self._done = {node for index, node in enumerate(graph) if index in set(state["done"])}
        # The earlier walk may have begun to remove what it had passed.
        self._forget(())

    def _new_number(self) -> int:
        self._numbered += 1
        return self._numbered

    def _file(self, value: ir.Value, prompt: int) -> Path:
        return self._folder / f"{self._known[value]}-{prompt}.npy"


def open_part(part: ir.Model, options: ort.SessionOptions) -> ort.InferenceSession:
    """Opens a part of a graph; what of its weights lies in a file beside the graph is mapped."""
    providers = ["CPUExecutionProvider"]
    tensors = (value.const_value for value in part.graph.initializers.values())
    folders = {Path(tensor.base_dir) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    if not folders:
        return ort.InferenceSession(ir.to_proto(part).SerializeToString(), options, providers=providers)
    # Weights in a file are found relative to the graph, and mapped rather than read.
    file = folders.pop() / "part.onnx"
    try:
        ir.save(part, file)
        return ort.InferenceSession(file, options, providers=providers)
    finally:
        file.unlink(missing_ok=True)


def _is_float_linear(node: ir.Node) -> bool:
    weight = node.inputs[1] if len(node.inputs) == 2 else None
    return node.op_type == "MatMul" and is_linear(node) and weight is not None and weight.dtype == ir.DataType.FLOAT


def _users(value: ir.Value) -> Iterator[ir.Node]:
    for node, _ in value.uses():
        yield node
