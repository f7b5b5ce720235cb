"""Lowers a vision encoder: its products and attention to 16-bit floats, the scoring of tokens in float32."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.engines.lowering.split import remove_unused
from qavp_export.engines.tensorrt.lowering.capabilities import ATTENTION, Capabilities
from qavp_export.engines.tensorrt.lowering.half import HalfProducts, stored_weight
from qavp_export.engines.tensorrt.lowering.network import HALF, LoweredNetwork, summarize
from qavp_export.engines.tensorrt.lowering.operators import write_out_attention, write_out_operators
from qavp_export.engines.tensorrt.lowering.score import lower_scores
from qavp_export.engines.tensorrt.lowering.select import lower_selection
from qavp_export.passes import realized_precision
from qavp_export.passes._linear import input_of, name_of
from qavp_export.passes.select_diverse import SELECT_DIVERSE

# Where `passes.prune_vision_tokens` puts its nodes.
_SCORING = "/prune/"
_WITH_WEIGHT = frozenset({"MatMul", "Gemm", "Conv"})


def lower_vision(model: ir.Model, capabilities: Capabilities) -> LoweredNetwork:
    """Lowers a canonical vision encoder; inputs and outputs stay.

    1. All that scores and selects tokens stays float32. Where there are plugins the score is two of them and the
       selection of diverse tokens three; see `lower_scores` and `lower_selection`.
    2. Linear layers, convolutions and attention operators run in FLOAT16, from float32 and to it: what is added up, and
       norms, stay float32. Beside a selection that stays a loop, attention is written out.
    3. Operators that the parser does not take are written out; see `write_out_operators`.

    Args:
        model: The vision encoder; it is not changed.
        capabilities: What the network may hold.

    Raises:
        GraphError: An operator that is written out has a form that is not known.
    """
    requested = {layer.node: layer.precision for layer in realized_precision(model)}
    model = model.clone()
    notes: tuple[str, ...] = ()
    if capabilities.plugins:
        refused = [*lower_scores(model).refused, *lower_selection(model).refused]
        notes = summarize(refused, "is inlined")
        remove_unused(model)
    # TensorRT-RTX 1.7 dies of signal 11 as it builds a network with an attention operator and a loop, connected or not;
    # a few networks of few layers get away. Nobody has tried TensorRT.
    has_loop = any(node.op_type == SELECT_DIVERSE for node in model.graph)
    keeps_attention = ATTENTION in capabilities.operators and not has_loop
    expected: dict[str, str] = {}
    halves = HalfProducts(model.graph)
    for node in list(model.graph):
        is_scoring = name_of(node).startswith(_SCORING)
        if node.op_type == ATTENTION and not keeps_attention:
            product = write_out_attention(model.graph, node, ir.DataType.FLOAT if is_scoring else ir.DataType.FLOAT16)
            expected |= {} if is_scoring else {product: HALF}
            continue
        if is_scoring:
            continue
        if node.op_type == ATTENTION:
            expected[name_of(node)] = HALF
        elif node.op_type in _WITH_WEIGHT and stored_weight(input_of(node, 1)) is not None:
            expected[name_of(node)] = "float16 x float16"
        else:
            continue
        halves.run_in_half(node)
    write_out_operators(model, capabilities)
    remove_unused(model)
    return LoweredNetwork(model, {node: requested.get(node, HALF) for node in expected}, expected, notes)
