"""What scoring and gather take: a vision encoder with them against the same graph without."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.engines.ort.cpu import cpu_graphs
from qavp_export.engines.ort.cuda import cuda_graphs
from qavp_export.engines.ort.encoders import VISION_OUTPUTS, VisionEncoder
from qavp_export.engines.ort.lowered import LoweredGraphs, vision_precision
from qavp_export.engines.ort.plan import EnginePlan
from qavp_export.engines.ort.session import value
from qavp_export.errors import UnavailableError
from qavp_export.manifest import Manifest

_UNPRUNED = "image_features_unpruned"
_FEATURES, _KEPT = VISION_OUTPUTS
_VISION = "vision_encoder."
_WARMUP = 3
# A difference between two times needs more runs than the times do, as long as they are short.
_MOST, _BUDGET_S = 200, 5.0

_OPENERS: Mapping[str, Callable[[Path, EngineOptions], LoweredGraphs]] = MappingProxyType(
    {"ort-cpu": cpu_graphs, "ort-cuda": cuda_graphs}
)


def measure_scoring(
    bundle: Path,
    engine: str,
    options: EngineOptions,
    inputs: Mapping[str, FloatArray | IntArray],
    repeats: int,
) -> tuple[list[float], list[float]]:
    """Runs the vision encoder as it is, and the same up to the projected tokens, in turn.

    Args:
        bundle: The bundle's folder.
        engine: The engine's name.
        options: How it is opened.
        inputs: What the vision encoder is given.
        repeats: How often each is run, at least.

    Returns:
        Seconds of each run with and without scoring and gather.

    Raises:
        UnavailableError: The two cannot be told apart; the message says why.
    """
    opener = _OPENERS.get(engine)
    if opener is None:
        raise UnavailableError(f"engine {engine} runs the vision encoder whole; it is not cut")
    manifest = Manifest.read(bundle)
    values = {
        name: value(array, np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32)
        for name, array in inputs.items()
    }

    def open_vision(folder: Path) -> VisionEncoder:
        graphs = opener(folder, options)
        return graphs.vision(vision_precision(graphs.backend, manifest, options))

    with tempfile.TemporaryDirectory(prefix="qavp-bench-") as work:
        cut = Path(work) / "bundle"
        write_without_scoring(bundle, f"engines/{engine}", cut)
        both = (open_vision(bundle), open_vision(cut))
    # The number of tokens to keep may be an input of the selection alone.
    feeds = [{name: given for name, given in values.items() if name in graph.inputs} for graph in both]
    for graph, given in [*zip(both, feeds, strict=True)] * _WARMUP:
        graph.run(given)
    whole: list[float] = []
    without: list[float] = []
    ends = time.perf_counter() + _BUDGET_S
    while len(whole) < repeats or (len(whole) < _MOST and time.perf_counter() < ends):
        for graph, given, taken in zip(both, feeds, (whole, without), strict=True):
            started = time.perf_counter()
            graph.run(given)[_FEATURES].numpy()
            taken.append(time.perf_counter() - started)
    return whole, without


def write_without_scoring(bundle: Path, engine_folder: str, target: Path) -> None:
    """Writes a bundle whose lowered vision encoders end at the projected tokens; all else links to the original.

    Args:
        bundle: The original.
        engine_folder: The folder inside it with an engine's lowered graphs.
        target: The new bundle's folder.

    Raises:
        UnavailableError: The bundle keeps all tokens: it scores none.
    """
    folder = bundle / engine_folder
    (target / engine_folder).mkdir(parents=True)
    for entry in bundle.iterdir():
        if entry.name != Path(engine_folder).parts[0]:
            (target / entry.name).symlink_to(entry.resolve())
    plan = EnginePlan.read(folder)
    graphs = {
        name: dataclasses.replace(graph, outputs=VISION_OUTPUTS) if name.startswith(_VISION) else graph
        for name, graph in plan.graphs.items()
    }
    dataclasses.replace(plan, graphs=graphs).write(target / engine_folder)
    for path in folder.glob("*.onnx"):
        if path.name.startswith(_VISION):
            _cut(path, target / engine_folder / path.name)
        else:
            (target / engine_folder / path.name).symlink_to(path.resolve())


def _cut(source: Path, target: Path) -> None:
    model = onnx.load(source, load_external_data=False)
    if not any(_UNPRUNED in node.output for node in model.graph.node):
        raise UnavailableError("all tokens are kept: none is scored")
    inputs = [found.name for found in model.graph.input]
    cut = onnx.utils.Extractor(model).extract_model(inputs, [_UNPRUNED])
    for node in cut.graph.node:
        node.output[:] = [_FEATURES if name == _UNPRUNED else name for name in node.output]
    cut.graph.output[0].name = _FEATURES
    # The contract's second output; nothing reads it here.
    none = numpy_helper.from_array(np.zeros((1, 0), np.int64))
    cut.graph.node.append(helper.make_node("Constant", [], [_KEPT], value=none))
    cut.graph.output.append(helper.make_tensor_value_info(_KEPT, onnx.TensorProto.INT64, [1, 0]))
    onnx.save(cut, target)
