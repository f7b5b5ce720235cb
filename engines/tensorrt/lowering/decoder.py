"""Lowers a decoder to one network that runs prompts and single tokens."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.engines.lowering.attention import find_attention, static_size
from qavp_export.engines.lowering.masks import classify_masks
from qavp_export.engines.lowering.split import gather_rows, head_input, remove_unused
from qavp_export.engines.tensorrt.lowering.attention import lower_attention
from qavp_export.engines.tensorrt.lowering.capabilities import Capabilities
from qavp_export.engines.tensorrt.lowering.linear import lower_linears
from qavp_export.engines.tensorrt.lowering.network import HALF, LoweredNetwork, summarize
from qavp_export.engines.tensorrt.lowering.operators import write_out_operators
from qavp_export.engines.tensorrt.lowering.precision import lower_floats, lower_quantized
from qavp_export.passes import NVFP4, realized_precision


def lower_decoder(model: ir.Model, context_length: int, capacity: int, capabilities: Capabilities) -> LoweredNetwork:
    """Lowers a canonical decoder.

    1. Attention runs in 16-bit floats over a cache of fixed size; see `lower_attention`.
    2. The last layer finishes the positions in `logit_positions [B,R]` only.
    3. Two-level W4A4 layers become plugins where there are plugins; see `lower_linears`. Others get the form that the
       builder has kernels for; see `lower_quantized` and `lower_floats`.
    4. Everything else stays as the canonical graph has it, in float32, but for operators that the parser does not take;
       see `write_out_operators`.

    Args:
        model: The decoder; it is not changed.
        context_length: Most tokens of a sequence.
        capacity: Tokens that the cache has memory for.
        capabilities: What the network may hold.

    Raises:
        GraphError: Attention, or an operator that is written out, has a form that is not known.
    """
    requested = {layer.node: layer.precision for layer in realized_precision(model)}
    model = model.clone()
    graph = model.graph
    sites = find_attention(graph)
    masks = list({str(site.mask.name): site.mask for site in sites}.values())
    kinds = classify_masks(model, masks, context_length)
    gather_rows(graph, sites[-1], head_input(graph))
    logits = next(value for value in graph.outputs if value.name == "logits")
    logits.shape = ir.Shape([ir.SymbolicDim("batch"), ir.SymbolicDim("rows"), static_size(logits, 2)])
    expected = dict.fromkeys(lower_attention(graph, sites, kinds, capacity, capabilities), HALF)
    expected |= {node: "fp4 x fp4" for node, precision in requested.items() if precision == NVFP4}
    notes: tuple[str, ...] = ()
    if capabilities.plugins:
        linears = lower_linears(model)
        expected |= dict.fromkeys(linears.matched, "plugin")
        notes = summarize(linears.refused, "stays quantizers and dequantizers")
        # The layers that they replace are no longer there to be lowered.
        remove_unused(model)
    expected |= lower_quantized(graph)
    expected |= lower_floats(graph)
    write_out_operators(model, capabilities)
    remove_unused(model)
    return LoweredNetwork(model, {node: requested.get(node, HALF) for node in expected}, expected, notes)
