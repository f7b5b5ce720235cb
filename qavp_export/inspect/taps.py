"""Runs a bundle's canonical vision encoder and shows what its selection is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.engines.ort.session import graph_path, one_line, session_options
from qavp_export.errors import BundleError, InputError, QavpError
from qavp_export.manifest import Manifest

_SCORE_NODE = "/prune/score/HybridTokenScore"
_DIVERSE_NODE = "/prune/select/SelectDiverse"
_TOPK_NODE = "/prune/select/TopK"
# Values inside the scoring function, and what they are called as outputs of the graph.
_INSIDE = ("error", "outlier")
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Selection:
    """What the vision encoder computes on the way to the tokens that it keeps, of one unit.

    Attributes:
        features: The projected tokens, before pruning `[N,D]`.
        semantic: Semantic relevance as the scorer yields it `[N]`.
        error: Quantization error E `[N]`.
        outlier: Outlier intensity R `[N]`.
        score: Hybrid score S `[N]`.
        kept: Tokens that are kept, ascending `[k]`.
        order: The same in the order of choice `[k]`: by score, or as a diverse selection took them.
    """

    features: FloatArray
    semantic: FloatArray
    error: FloatArray
    outlier: FloatArray
    score: FloatArray
    kept: IntArray
    order: IntArray


class TappedVision:
    """The vision encoder, opened with what its selection is made of as further outputs.

    The graph is changed in memory only; its weights are read from the bundle's files.

    Args:
        bundle: The bundle's folder.
        manifest: Its manifest.
        options: How the graph is opened.

    Raises:
        BundleError: The graph is missing, or cannot be opened.
        InputError: The bundle keeps every token, so that none is scored.
    """

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        path = graph_path(bundle, manifest, "vision_encoder")
        model = load_graph(path)
        self._names = _tap(model, bundle)
        settings = session_options(options)
        settings.add_session_config_entry(_EXTERNAL_FOLDER, str(path.parent.resolve()))
        try:
            self._session = ort.InferenceSession(
                model.SerializeToString(), sess_options=settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise BundleError(f"{path} cannot be opened ({one_line(error)}); export the bundle again") from error

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[Selection]:
        """Runs one call of the vision encoder.

        Args:
            inputs: The graph's inputs by name, as `Layout.calls` yields them.

        Returns:
            One selection for each unit of the call.

        Raises:
            QavpError: ONNX Runtime fails.
        """
        feeds = {
            name: np.ascontiguousarray(array, np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32)
            for name, array in inputs.items()
        }
        try:
            values = self._session.run(list(self._names.values()), feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise QavpError(f"ONNX Runtime failed in the vision encoder ({one_line(error)})") from error
        found = dict(zip(self._names, values, strict=True))
        found["features"] = found["features"].astype(np.float32)
        units = len(found["kept"])
        return [Selection(**{name: value[unit] for name, value in found.items()}) for unit in range(units)]


def load_graph(path: Path) -> onnx.ModelProto:
    """Reads a graph without its weights.

    Raises:
        BundleError: It is missing or damaged.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; export the bundle again") from None
    except Exception as error:  # protobuf's errors share no narrower base class
        raise BundleError(f"{path} is no ONNX graph ({one_line(error)}); export the bundle again") from error


def _tap(model: onnx.ModelProto, bundle: Path) -> dict[str, str]:
    """Adds what a `Selection` holds to a graph's outputs; returns their names by field."""
    nodes = {node.name: node for node in model.graph.node}
    score, chooser = nodes.get(_SCORE_NODE), nodes.get(_DIVERSE_NODE, nodes.get(_TOPK_NODE))
    if score is None or chooser is None:
        raise InputError(
            f"{bundle} keeps every vision token (keep 1.0), so none is scored; export with --keep below 1 to see a "
            "selection"
        )
    _show_inside(model, score, bundle)
    names = {
        "features": score.input[0],
        "semantic": score.input[1],
        "error": score.output[1],
        "outlier": score.output[2],
        "score": score.output[0],
        "kept": "kept_indices",
        "order": chooser.output[1],
    }
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values() if name not in known)
    return names


def _show_inside(model: onnx.ModelProto, node: onnx.NodeProto, bundle: Path) -> None:
    """Makes E and R, which the scoring function computes, outputs of function and node."""
    for function in model.functions:
        if (function.domain, function.name) == (node.domain, node.op_type):
            function.output.extend(_INSIDE)
            node.output.extend(f"{node.name}/{name}" for name in _INSIDE)
            return
    raise BundleError(f"{bundle}: the vision encoder lacks the function {node.op_type}; export the bundle again")
