"""Lowers the embedding: TensorRT runs what the canonical graph computes as it is."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.engines.tensorrt.lowering.capabilities import Capabilities
from qavp_export.engines.tensorrt.lowering.network import LoweredNetwork
from qavp_export.engines.tensorrt.lowering.operators import write_out_operators


def lower_embedding(model: ir.Model, capabilities: Capabilities) -> LoweredNetwork:
    """Lowers a canonical embedding.

    Args:
        model: The embedding; it is not changed.
        capabilities: What the network may hold.
    """
    model = model.clone()
    write_out_operators(model, capabilities)
    return LoweredNetwork(model, {}, {})
