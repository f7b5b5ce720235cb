"""Quantization regimes of the paper's table: the decoders of bundles, and what becomes of them with shared scales.

In the recipes' own regimes every token has its own activation scales. Here the 4-bit activation quantizers of a decoder
are also replaced by ones with a single scale for a whole tensor, so that one token can change the codes of another:
`static`, calibrated beforehand, or `dynamic`, the largest value among all tokens of a prompt.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper

from qavp_export.engines import Engine, EngineOptions, FloatArray
from qavp_export.engines.ort.encoders import OrtEncoders
from qavp_export.engines.ort.growing import GrowingDecoder, GrowingSession
from qavp_export.engines.ort.reference import OrtReferenceEngine
from qavp_export.engines.ort.session import Graph, Values, graph_path, value
from qavp_export.engines.sequences import cache_names
from qavp_export.errors import InputError
from qavp_export.manifest import Manifest
from qavp_export.recipe import Recipe, make_recipe
from qavp_export.runtime.batching import Prepared

Sharing: TypeAlias = Literal["static", "dynamic"]
"""How the tokens of a prompt share an activation scale."""

Kind: TypeAlias = Literal["static", "dynamic", "observe"]
"""What a decoder's activation quantizers become."""

# Bundles are exported with it; their decoders do not depend on it.
_KEEP = 0.125
_LOWEST, _HIGHEST = -8.0, 7.0


@dataclass(frozen=True)
class Regime:
    """How the decoder is quantized.

    Attributes:
        preset: The recipe's preset.
        fields: Recipe fields over it.
        sharing: How tokens share activation scales; None: each has its own, as the recipe says.
        meaning: What tables say of it.
    """

    preset: str
    meaning: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    sharing: Sharing | None = None

    def recipe(self) -> Recipe:
        """Returns the recipe that the regime's bundle is exported by: the paper's score, whatever the defaults are."""
        paper = {"keep": _KEEP, "select": "topk", "alpha": 0.5, "score_input": "raw"}
        return make_recipe(self.preset, {**paper, **self.fields})


_ONE_LEVEL: Mapping[str, Any] = MappingProxyType({"scales": "one-level"})

REGIMES: Mapping[str, Regime] = MappingProxyType(
    {
        "full": Regime("none", "full precision"),
        "two-level": Regime("rotate", "W4A4, two-level group scales per token (the default)", {"scales": "two-level"}),
        "one-level": Regime("rotate", "W4A4, one-level group scales per token", _ONE_LEVEL),
        "shared": Regime("rotate", "W4A4, one activation scale for all tokens of a prompt", _ONE_LEVEL, "dynamic"),
        "static": Regime("rotate", "W4A4, one calibrated activation scale per tensor", _ONE_LEVEL, "static"),
        "static-plain": Regime("rtn", "as static, without rotations", _ONE_LEVEL, "static"),
    }
)


def open_regime(regime: Regime, bundle: Path, folder: Path, options: EngineOptions) -> Engine:
    """Opens a regime's decoder.

    Args:
        regime: The regime.
        bundle: The bundle of its recipe.
        folder: An empty folder for graphs that are made.
        options: How graphs are opened.

    Raises:
        QavpError: The bundle cannot be opened.
    """
    manifest = Manifest.read(bundle)
    if regime.sharing is None:
        return OrtReferenceEngine(bundle, manifest, options)
    return SharedScaleEngine(bundle, manifest, options, regime.sharing, folder)


class SharedScaleEngine(OrtEncoders):
    """A bundle whose decoder has one activation scale per tensor.

    Args:
        bundle: The bundle.
        manifest: Its manifest.
        options: How graphs are opened.
        sharing: Where the scales come from; `static` needs `calibrate` before anything is asked.
        folder: An empty folder for the graphs.

    Raises:
        InputError: The decoder has no 4-bit activations.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, options: EngineOptions, sharing: Sharing, folder: Path
    ) -> None:
        super().__init__(bundle, manifest, options)
        self._spec = manifest.decoder
        self._past, present = cache_names(manifest.decoder.num_layers)
        source = graph_path(bundle, manifest, "decoder")
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
        inputs = ["inputs_embeds", "attention_mask", "position_ids", *self._past]
        outputs = ["logits", *present]
        path, scales = write_graph(source, folder / f"{sharing}.onnx", sharing)
        self._graph = ScaledGraph("decoder", path, options, [*inputs, *scales], outputs)
        self._observer: ObservingGraph | None = None
        if sharing == "static":
            path, amplitudes = write_graph(source, folder / "observe.onnx", "observe")
            self._observer = ObservingGraph("decoder", path, options, inputs, [*outputs, *amplitudes])
            self._scales = scales

    def start(self, capacity: int = 0) -> GrowingSession:  # noqa: ARG002  # the cache grows with every token
        """See `Engine.start`."""
        return self._start(self._graph)

    def calibrate(self, prompts: Iterable[Prepared]) -> FloatArray:
        """Sets static scales to what the largest values of prompts need; other scales are left to themselves.

        Args:
            prompts: Batches without padding; activations are not rounded while they run.

        Returns:
            The scale of each quantizer `[Q]`, in the order of the graph; empty if they are not static.
        """
        if self._observer is None:
            return np.zeros(0, np.float32)
        self._observer.largest = np.zeros(len(self._scales), np.float32)
        for batch in prompts:
            if not batch.attention_mask.all():
                raise InputError("prompts to calibrate on have padding; batch those of one length")
            session = self._start(self._observer)
            session.prefill(batch.inputs_embeds, batch.attention_mask, batch.position_ids, logits_to_keep=1)
        scales: FloatArray = self._observer.largest / np.float32(_HIGHEST)
        scales = np.where(scales > 0, scales, np.float32(1))
        self._graph.scales = {name: value(scale, np.float32) for name, scale in zip(self._scales, scales, strict=True)}
        return scales

    def _start(self, graph: Graph) -> GrowingSession:
        return GrowingSession(GrowingDecoder(self, graph, graph, None, self._spec, typed=False))


class ScaledGraph(Graph):
    """A decoder that takes its activation scales as inputs.

    Attributes:
        scales: The scales, by input name.
    """

    scales: Values = {}  # noqa: RUF012  # replaced, never changed

    def run(self, inputs: Values) -> Values:
        """See `Graph.run`."""
        return super().run({**inputs, **self.scales})


class ObservingGraph(Graph):
    """A decoder with float activations that keeps the largest magnitude at the place of each quantizer.

    Attributes:
        largest: `[Q]`.
    """

    largest: FloatArray

    def run(self, inputs: Values) -> Values:
        """See `Graph.run`."""
        outputs = super().run(inputs)
        found = [outputs[name].numpy() for name in _names("observe", len(self.largest))]
        self.largest = np.maximum(self.largest, np.array(found, np.float32))
        return outputs


def write_graph(source: Path, target: Path, kind: Kind) -> tuple[Path, list[str]]:
    """Writes a canonical decoder with other activation quantizers.

    Args:
        source: The canonical graph.
        target: The new file, in a folder that has a copy of the weights.
        kind: `static` makes `q = clip(round(x / s), -8, 7)`, `x^ = q * s` with a scale s that is an input; `dynamic`
            the same with the largest magnitude of all tokens and channels of a row over 7; `observe` leaves
            activations as they are and returns their largest magnitudes.

    Returns:
        The file, and the names of the new inputs (static) or outputs (observe), one for each quantizer.

    Raises:
        InputError: There is no 4-bit activation quantizer.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    quantizers = [node for node in graph.node if _is_activation_quantizer(node, made_by)]
    if not quantizers:
        raise InputError(f"{source} has no 4-bit activations; choose a W4A4 recipe")
    names = _names(kind, len(quantizers))
    gone = []
    replaced: dict[str, Sequence[onnx.NodeProto]] = {}
    for node, name in zip(quantizers, names, strict=True):
        last = readers[node.output[0]]
        replaced[last.output[0]] = _NODES[kind](node.input[0], last.output[0], name)
        gone += [made_by[node.input[1]].output[0], node.output[0]]
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        output = node.output[0] if node.output else ""
        kept += replaced.get(output, [] if output in gone else [node])
    del graph.node[:]
    graph.node.extend(kept)
    constants = {"shared.lowest": _LOWEST, "shared.highest": _HIGHEST, "shared.one": 1.0, "shared.zero": 0.0}
    graph.initializer.extend(helper.make_tensor(name, TensorProto.FLOAT, [], [x]) for name, x in constants.items())
    graph.initializer.append(helper.make_tensor("shared.axes", TensorProto.INT64, [2], [1, 2]))
    if kind == "dynamic":
        names = []
    described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in names]
    (graph.output if kind == "observe" else graph.input).extend(described)
    onnx.save(model, target)
    return target, names


def _names(kind: Kind, count: int) -> list[str]:
    return [f"shared.{kind}.{index}" for index in range(count)]


def _is_activation_quantizer(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    if node.op_type != "QuantizeLinear" or node.input[1] not in made_by:
        return False
    types = [attribute.i for attribute in node.attribute if attribute.name == "output_dtype"]
    return made_by[node.input[1]].domain == "qavp" and types == [TensorProto.INT4]


def _observe(x: str, output: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Identity", [x], [output]),
        helper.make_node("Abs", [x], [f"{name}.magnitude"]),
        helper.make_node("ReduceMax", [f"{name}.magnitude"], [name], keepdims=0),
    ]


def _static(x: str, output: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Div", [x, name], [f"{name}.ratio"]),
        helper.make_node("Round", [f"{name}.ratio"], [f"{name}.rounded"]),
        helper.make_node("Clip", [f"{name}.rounded", "shared.lowest", "shared.highest"], [f"{name}.codes"]),
        helper.make_node("Mul", [f"{name}.codes", name], [output]),
    ]


def _dynamic(x: str, output: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Abs", [x], [f"{name}.magnitude"]),
        helper.make_node("ReduceMax", [f"{name}.magnitude", "shared.axes"], [f"{name}.peak"], keepdims=1),
        helper.make_node("Div", [f"{name}.peak", "shared.highest"], [f"{name}.quotient"]),
        helper.make_node("Greater", [f"{name}.quotient", "shared.zero"], [f"{name}.positive"]),
        helper.make_node("Where", [f"{name}.positive", f"{name}.quotient", "shared.one"], [name]),
        *_static(x, output, name),
    ]


_NODES = MappingProxyType({"observe": _observe, "static": _static, "dynamic": _dynamic})
