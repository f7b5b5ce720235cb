"""Lowers the embedding: TensorRT runs the canonical graph as it is."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.engines.tensorrt.lowering.network import LoweredNetwork


def lower_embedding(model: ir.Model) -> LoweredNetwork:
    """Lowers a canonical embedding.

    Args:
        model: The embedding; it is not changed.
    """
    return LoweredNetwork(model.clone(), {}, {})
