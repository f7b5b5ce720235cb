"""Builds what the engines of ONNX Runtime load: lowered graphs beside a plan of their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qavp_export.engines.ort.lowering.capabilities import CPU, CPU_UNSIGNED, CUDA, Capabilities
from qavp_export.engines.ort.lowering.codes import cache_probe
from qavp_export.engines.ort.lowering.decoder import DecoderLowering
from qavp_export.engines.ort.lowering.selection import split_selection
from qavp_export.engines.ort.lowering.vision import lower_vision
from qavp_export.engines.ort.lowering.weights import Lowered
from qavp_export.engines.ort.plan import CPU_FOLDER, CUDA_FOLDER, SELECTION, EnginePlan, GraphPlan
from qavp_export.manifest import Manifest
from qavp_export.passes import NVFP4

# What the CPU's exactness is tried on: one row of the codes times these weights.
_PROBE = (64, 16)
_INTEGER_FORMS = frozenset({"products", "rounded"})


def build_engines(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """Lowers a bundle's graphs for the engines of ONNX Runtime.

    Args:
        bundle: The bundle's folder, with the canonical graphs and their weights; takes `engines/<name>`.
        manifest: The bundle's manifest.

    Returns:
        What was built, by engine name, as the manifest says it; nothing for a decoder that ONNX Runtime does not run.
    """
    if NVFP4 in manifest.precision.values():
        return {}
    decoder = DecoderLowering(_load(bundle, manifest, "decoder"), manifest.decoder.context_length)
    vision = _load(bundle, manifest, "vision_encoder")
    engines = {"ort-cpu": (CPU_FOLDER, CPU, CPU_UNSIGNED), "ort-cuda": (CUDA_FOLDER, CUDA, None)}
    described = {}
    for name, (folder, capabilities, unsigned) in engines.items():
        builder = _Builder(decoder, vision, capabilities, unsigned)
        described[name] = _describe(folder, builder.write(bundle / folder))
    return described


def _describe(folder: str, plan: EnginePlan) -> dict[str, Any]:
    """Counts the precisions that each graph's quantized layers run in."""
    graphs = {name: dict(Counter(graph.precision.values())) for name, graph in plan.graphs.items() if graph.precision}
    return {"folder": folder, "cache": plan.cache, "precision": graphs, "notes": list(plan.notes)}


class _Builder:
    """Lowers everything for one provider, and again with unsigned weights where it may need these."""

    def __init__(
        self, decoder: DecoderLowering, vision: ir.Model, capabilities: Capabilities, unsigned: Capabilities | None
    ) -> None:
        self._decoder = decoder
        self._vision = vision
        self._capabilities = capabilities
        self._unsigned = unsigned

    def write(self, folder: Path) -> EnginePlan:
        """Writes the graphs and their plan."""
        folder.mkdir(parents=True, exist_ok=True)
        plans = {name: _write(folder / f"{name}.onnx", graph) for name, graph in self._graphs()}
        refused = self._decoder.refused
        notes = () if refused is None else (f"the cache is copied as it grows: {refused}",)
        plan = EnginePlan(plans, "preallocated" if refused is None else "growing", notes)
        plan.write(folder)
        return plan

    def _graphs(self) -> Iterator[tuple[str, Lowered]]:
        """Yields one decoder for prompts and single tokens where one can do both, and two where these are faster."""
        decoder = self._decoder
        yield "probe", _probe()
        yield "head", decoder.head(self._capabilities)
        yield from self._vision_graphs()
        if decoder.runs_both:
            yield from self._exact("decoder", lambda provider: decoder.body("any", "packed", provider))
        if decoder.differs or not decoder.runs_both:
            yield from self._exact("prefill", lambda provider: decoder.body("prefill", "integer", provider))
            yield from self._exact("decode", lambda provider: decoder.body("decode", "packed", provider))
        if decoder.refused is None and self._capabilities.coded_caches:
            yield "probe.int8", cache_probe()
            yield from self._exact("decode.int8", lambda p: decoder.body("decode", "packed", p.with_codes()))

    def _vision_graphs(self) -> Iterator[tuple[str, Lowered]]:
        """Yields the vision encoder in both precisions, whole or up to a selection that the CPU is faster at."""
        vision = self._vision
        parts = None if self._capabilities.loops else split_selection(vision)
        if parts is not None:
            vision, selection = parts
            yield SELECTION, lower_vision(selection, "fp32", CPU)
        yield "vision_encoder.fp32", lower_vision(vision, "fp32", self._capabilities)
        yield from self._exact("vision_encoder.w8a8", lambda provider: lower_vision(vision, "w8a8", provider))

    def _exact(self, name: str, lower: Callable[[Capabilities], Lowered]) -> Iterator[tuple[str, Lowered]]:
        lowered = lower(self._capabilities)
        yield name, lowered
        if self._unsigned is not None and any(plan.form in _INTEGER_FORMS for plan in lowered.weights):
            yield f"{name}.unsigned", lower(self._unsigned)


def _load(bundle: Path, manifest: Manifest, component: str) -> ir.Model:
    return ir.load(bundle / manifest.components[component].file)


def _write(path: Path, graph: Lowered) -> GraphPlan:
    ir.save(graph.model, path)
    inputs = tuple(str(value.name) for value in graph.model.graph.inputs)
    outputs = tuple(str(value.name) for value in graph.model.graph.outputs)
    return GraphPlan(path.name, inputs, outputs, tuple(graph.weights), dict(graph.precision))


def _probe() -> Lowered:
    """Returns a product of `codes [M,64]` and signed weights that overflows where pairs are added in 16 bits."""
    codes = ir.Value(name="codes", shape=ir.Shape(["rows", _PROBE[0]]), type=ir.TensorType(ir.DataType.UINT8))
    weight = ir.Value(name="weight", const_value=ir.tensor(np.full(_PROBE, 127, np.int8), name="weight"))
    node = ir.node("MatMulInteger", [codes, weight], name="product")
    product = node.outputs[0]
    product.name, product.dtype = "product", ir.DataType.INT32
    product.shape = ir.Shape(["rows", _PROBE[1]])
    graph = ir.Graph([codes], [product], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="probe")
    return Lowered(ir.Model(graph, ir_version=10), [])
