"""From a Hugging Face configuration to ONNX graphs without weights."""

from qavp_export.tracing.naming import CLIP, PARAMETER
from qavp_export.tracing.skeleton import build_clip_skeleton, build_skeleton
from qavp_export.tracing.trace import OPSET, WeightSource, trace_components

__all__ = ["CLIP", "OPSET", "PARAMETER", "WeightSource", "build_clip_skeleton", "build_skeleton", "trace_components"]
