"""Lowers the scoring of image tokens to two functions that each run as one kernel."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.tensorrt.functions import (
    MIX_TOKEN_SCORE,
    PLUGIN_ATTRIBUTES,
    TOKEN_SENSITIVITY,
    split_hybrid_score,
)
from qavp_export.engines.tensorrt.lowering.cut import cut_nodes
from qavp_export.errors import InputError
from qavp_export.numerics.score import ScoreInput
from qavp_export.passes._builder import Dim, NodeBuilder
from qavp_export.passes._infra import RewriteResult
from qavp_export.passes._linear import input_of, name_of
from qavp_export.passes.functions import DOMAIN, HYBRID_TOKEN_SCORE, add_function

_FLOAT = ir.DataType.FLOAT


def lower_scores(model: ir.Model) -> RewriteResult:
    """Cuts every `HybridTokenScore` node in two: `TokenSensitivity` and `MixTokenScore`.

    A quick plugin is one kernel, and no kernel of many blocks can compare tokens before all blocks have scored theirs.
    The functions' bodies are the canonical one's, so that scores are the same bits. A node whose groups no kernel takes
    stays, and is inlined.

    Args:
        model: A canonical vision encoder; it is changed, and what is no longer used stays in it.

    Returns:
        How many nodes were cut, and which were not.

    Raises:
        GraphError: A node's function is not in the model, or is of another version.
    """
    return cut_nodes(model, HYBRID_TOKEN_SCORE, _why_not, _cut)


def _why_not(node: ir.Node) -> str | None:
    """Returns why the kernel cannot score a node's features, or None."""
    # Triton is for those who build plugins; TensorRT-RTX has none.
    from qavp_export.engines.kernels.score import token_sensitivity_spec

    shape = input_of(node, 0).shape
    width = None if shape is None else shape[-1]
    if not isinstance(width, int):
        return "its features have no static width"
    score_input: ScoreInput = "rms" if _is_rms(node) else "raw"
    try:
        token_sensitivity_spec("fp32", width, node.attributes["group_size"].as_int(), score_input)
    except InputError as error:
        return str(error)
    return None


def _is_rms(node: ir.Node) -> bool:
    return node.attributes["score_input"].as_string() == "rms"


def _cut(model: ir.Model, node: ir.Node, function: ir.Function) -> None:
    for part in split_hybrid_score(function):
        add_function(model, part)
    features, semantic = input_of(node, 0), input_of(node, 1)
    shape: tuple[Dim, ...] = tuple(node.outputs[0].shape or ())
    builder = NodeBuilder(name_of(node).removesuffix(f"/{HYBRID_TOKEN_SCORE}"))
    attributes = {
        "group_size": node.attributes["group_size"].as_int(),
        "rms": int(_is_rms(node)),
        **PLUGIN_ATTRIBUTES,
    }
    error = builder.op(
        TOKEN_SENSITIVITY, TOKEN_SENSITIVITY, [features], _FLOAT, shape, attributes, domain=DOMAIN, outputs=2
    )
    outlier = builder.nodes[-1].outputs[1]
    outlier.dtype, outlier.shape = _FLOAT, ir.Shape(shape)
    weights = {name: node.attributes[name].as_float() for name in ("alpha", "outlier_weight")}
    inputs = [error, outlier, semantic]
    mix = {**weights, **PLUGIN_ATTRIBUTES}
    score = builder.op(MIX_TOKEN_SCORE, MIX_TOKEN_SCORE, inputs, _FLOAT, shape, mix, domain=DOMAIN)
    model.graph.insert_before(node, builder.nodes)
    replace_value(node.outputs[0], score)
