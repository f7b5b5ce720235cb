"""Builds small graphs from text and runs them with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

Array = npt.NDArray[np.generic]


def graph(signature: str, body: str, *, opset: int = 23, domains: str = '"com.microsoft": 1') -> ir.Model:
    """A model in ONNX's text form, with the shapes that ONNX can infer."""
    text = f'<ir_version: 11, opset_import: ["": {opset}, {domains}]> hand_made {signature} {{{body}}}'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def session(model: ir.Model, *, optimize: bool) -> ort.InferenceSession:
    """A session on the CPU of a model that ONNX's checker accepts."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, feeds: Mapping[str, Array], *, optimize: bool = False) -> Sequence[Array]:
    """All outputs of a model."""
    return session(model, optimize=optimize).run(None, dict(feeds))  # type: ignore[no-any-return]


def op_types(model: ir.Model) -> list[str]:
    """The operators of a graph, in order."""
    return [node.op_type for node in model.graph]
