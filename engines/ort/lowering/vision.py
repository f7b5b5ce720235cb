"""Lowers a vision encoder: its linear layers to products of 8-bit integers, its attention to one operator per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qavp_export.engines.lowering.activation import Activation
from qavp_export.engines.lowering.attention import static_size
from qavp_export.engines.lowering.split import remove_unused
from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.ort.lowering.activations import ActivationQuantizers
from qavp_export.engines.ort.lowering.capabilities import Capabilities
from qavp_export.engines.ort.lowering.half import HALF, widen_halves
from qavp_export.engines.ort.lowering.linear import replace_by_product
from qavp_export.engines.ort.lowering.selection import lower_selection
from qavp_export.engines.ort.lowering.weights import Lowered, WeightPlans
from qavp_export.passes._infra import upstream
from qavp_export.passes._linear import input_of, name_of
from qavp_export.passes.functions import DOMAIN, HYBRID_TOKEN_SCORE

VisionPrecision = Literal["w8a8", "fp32"]

_FLOAT = ir.DataType.FLOAT
_LARGEST_CODE = 127.0
# Between tokens by heads and heads by tokens.
_SWAP_HEADS = (0, 2, 1, 3)


def lower_vision(model: ir.Model, vision: VisionPrecision, capabilities: Capabilities) -> Lowered:
    """Lowers a canonical vision encoder; inputs and outputs stay.

    1. `w8a8`: a linear layer becomes one product of 8-bit integers. Its weights are rounded when the engine loads, one
       scale for each output channel; its input is rounded at run time, one scale for each token, once for all layers
       that read it. Biases are added in float. A layer whose weight is no matrix in the bundle's files, or whose input
       has no static width, stays float; so do the patch embedding (a Conv), attention, and all that scores tokens, with
       CLIP's text tower.
    2. Attention of heads that are views of one value reads that value, without transposing it.
    3. Weights that are stored in 16 bits are widened when the engine loads instead of in the graph.
    4. Diverse tokens are chosen as the CPU does it fastest; see `lower_selection`.

    Args:
        model: The vision encoder of a bundle, or a part of it; see `split_selection`. It is not changed.
        vision: The precision of linear layers.
        capabilities: What the provider runs fast.

    Raises:
        GraphError: A weight does not lie in the bundle's files, or a 16-bit one is read by an operator not known here.
    """
    model = model.clone()
    plans = WeightPlans("vision_encoder")
    precision = _round_linears(model.graph, capabilities, plans) if vision == "w8a8" else {}
    _join_heads(model.graph)
    lower_selection(model)
    remove_unused(model)
    widen_halves(model.graph, plans)
    remove_unused(model)
    return Lowered(model, plans.finish(model.graph), precision)


@dataclass(frozen=True)
class _FloatLinear:
    """A linear layer `MatMul(x, weight)`.

    Attributes:
        node: The MatMul.
        weight: Initializer `[K,N]`, FLOAT or 16-bit.
        sizes: K and N.
    """

    node: ir.Node
    weight: ir.Value
    sizes: tuple[int, int]


def _round_linears(graph: ir.Graph, capabilities: Capabilities, plans: WeightPlans) -> dict[str, str]:
    """Lowers what can be lowered; returns the precision of each such layer by the name of its node."""
    precision = {}
    quantizers = ActivationQuantizers(graph, capabilities)
    form = "unsigned_rounded" if capabilities.weights == ir.DataType.UINT8 else "rounded"
    scoring = _only_scores(graph)
    for layer in list(_float_linears(graph)):
        if layer.node in scoring:
            continue
        inputs, outputs = layer.sizes
        activation = Activation(input_of(layer.node, 0), inputs, _LARGEST_CODE, two_level=False)
        product = quantizers.products(activation, layer.node)
        name, parts = str(layer.weight.name), {"tensor": layer.weight}
        weight = plans.add(graph, f"{name}.{form}", form, parts, capabilities.weights, layer.sizes)
        scales = plans.add(graph, f"{name}.rounded_scales", "rounded_scales", parts, _FLOAT, (outputs,))
        replace_by_product(graph, layer.node, product, weight, scales, capabilities)
        precision[name_of(layer.node)] = "w8a8"
    return precision


def _only_scores(graph: ir.Graph) -> set[ir.Node]:
    """Returns the nodes that a score depends on and the scored features do not."""
    scores = [node for node in graph if node.op_type == HYBRID_TOKEN_SCORE and node.domain == DOMAIN]
    return {node for score in scores for node in upstream(input_of(score, 1)) - upstream(input_of(score, 0))}


def _float_linears(graph: ir.Graph) -> Iterator[_FloatLinear]:
    """Yields the linear layers that can be lowered."""
    for node in graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        x, weight = input_of(node, 0), _behind_cast(input_of(node, 1))
        if not isinstance(weight.const_value, ir.ExternalTensor) or weight.dtype not in (_FLOAT, *HALF):
            continue
        if weight.shape is None or len(weight.shape) != 2 or x.shape is None or node.outputs[0].shape is None:
            continue
        inputs, outputs = weight.shape.numpy()
        if x.dtype == _FLOAT and x.shape[-1] == inputs:
            yield _FloatLinear(node, weight, (inputs, outputs))


def _behind_cast(value: ir.Value) -> ir.Value:
    node = value.producer()
    return input_of(node, 0) if node is not None and node.op_type == "Cast" else value


def _join_heads(graph: ir.Graph) -> None:
    """Lets Attention read queries, keys and values by token `[B,T,H*d]` where `[B,H,T,d]` are views of them."""
    for node in list(graph):
        # With a mask or a cache there are more inputs.
        if node.op_type != "Attention" or len(node.inputs) != 3:
            continue
        by_token = [_heads_of(input_of(node, index)) for index in range(3)]
        joined = _joined(node.outputs[0])
        if joined is None or any(value is None for value in by_token):
            continue
        heads = {"q_num_heads": static_size(input_of(node, 0), 1), "kv_num_heads": static_size(input_of(node, 1), 1)}
        counts = [ir.AttrInt64(name, count) for name, count in heads.items()]
        attributes = [*node.attributes.values(), *counts]
        fused = ir.Node("", "Attention", by_token, attributes, num_outputs=1, name=f"{name_of(node)}/by_token")
        fused.outputs[0].name = f"{fused.name}_output_0"
        fused.outputs[0].type, fused.outputs[0].shape = joined.type, joined.shape
        graph.insert_before(node, fused)
        replace_value(joined, fused.outputs[0])


def _heads_of(value: ir.Value) -> ir.Value | None:
    """Returns `x [B,T,H*d]` of a value `Transpose(Reshape(x)) [B,H,T,d]`; None if it is made otherwise."""
    swap = value.producer()
    if swap is None or not _swaps_heads(swap):
        return None
    split = input_of(swap, 0).producer()
    if split is None or split.op_type != "Reshape":
        return None
    x, heads = input_of(split, 0), split.outputs[0]
    return x if _merges(heads, x) else None


def _joined(value: ir.Value) -> ir.Value | None:
    """Returns the value `Reshape(Transpose(o)) [B,T,H*d]` that alone reads `o [B,H,T,d]`; None if there is none."""
    for operator in ("Transpose", "Reshape"):
        readers = value.consumers()
        if len(readers) != 1 or readers[0].op_type != operator or value.is_graph_output():
            return None
        if operator == "Transpose" and not _swaps_heads(readers[0]):
            return None
        heads, value = value, readers[0].outputs[0]
    return value if _merges(heads, value) else None


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _SWAP_HEADS


def _merges(heads: ir.Value, tokens: ir.Value) -> bool:
    """Whether the last two axes of `[B,T,H,d]` are the last of `[B,T,H*d]`."""
    split, merged = heads.shape, tokens.shape
    if split is None or merged is None or len(split) != 4 or len(merged) != 3 or split[:2] != merged[:2]:
        return False
    count, size = split[2], split[3]
    return isinstance(count, int) and isinstance(size, int) and merged[2] == count * size
