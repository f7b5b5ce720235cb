"""Lowers the selection of diverse tokens to three functions that each run as one kernel."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.engines.lowering.values import replace_value
from qavp_export.engines.tensorrt.functions import (
    PLUGIN_ATTRIBUTES,
    SELECT_DPP,
    SELECT_MAXMIN,
    TOKEN_CODES,
    TOKEN_PRODUCTS,
    split_select_diverse,
)
from qavp_export.engines.tensorrt.lowering.cut import cut_nodes
from qavp_export.errors import InputError
from qavp_export.numerics.diverse import Diversity, code_width
from qavp_export.passes._builder import Dim, NodeBuilder
from qavp_export.passes._infra import RewriteResult
from qavp_export.passes._linear import input_of, name_of
from qavp_export.passes.functions import DOMAIN, add_function
from qavp_export.passes.select_diverse import SELECT_DIVERSE

_INT8, _INT32, _INT64 = ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64
_FLOAT = ir.DataType.FLOAT


def lower_selection(model: ir.Model) -> RewriteResult:
    """Cuts every `SelectDiverse` node in three: `TokenCodes`, `TokenProducts` and `SelectDpp` or `SelectMaxmin`.

    A quick plugin is one kernel, and no kernel of many blocks can choose before all blocks have multiplied; one block
    for each image would take longer to multiply than all of them to do everything. A node that no kernel takes stays,
    and is inlined: its loop runs step by step.

    Args:
        model: A canonical vision encoder; it is changed, and what is no longer used stays in it.

    Returns:
        How many nodes were cut, and which were not.

    Raises:
        GraphError: A node's function is not in the model, or is of another version.
    """
    return cut_nodes(model, SELECT_DIVERSE, _why_not, _cut)


def _why_not(node: ir.Node) -> str | None:
    """Returns why the kernels cannot select for a node, or None."""
    # Triton is for those who build plugins; TensorRT-RTX has none.
    from qavp_export.engines.kernels.select import select_dpp_spec
    from qavp_export.engines.kernels.similarity import token_codes_spec

    shape = input_of(node, 0).shape
    tokens, width = (None, None) if shape is None else shape[1:]
    kept = _kept(node)
    if not isinstance(tokens, int) or not isinstance(width, int):
        return "its features have no static number of tokens and channels"
    if kept is None:
        return "it keeps a number of tokens that is given at run time"
    try:
        token_codes_spec("fp32", width)
        select_dpp_spec(tokens, kept)
    except InputError as error:
        return str(error)
    return None


def _kept(node: ir.Node) -> int | None:
    count = ir.convenience.get_const_tensor(input_of(node, 2))
    return None if count is None else int(count.numpy().item())


def _cut(model: ir.Model, node: ir.Node, function: ir.Function) -> None:
    select: Diversity = "dpp" if node.attributes["select"].as_string() == "dpp" else "maxmin"
    for part in split_select_diverse(function, select):
        add_function(model, part)
    features, score = input_of(node, 0), input_of(node, 1)
    images, tokens, width = tuple(features.shape or ())
    builder = NodeBuilder(name_of(node).removesuffix(f"/{SELECT_DIVERSE}"))
    # `_why_not` has seen that the number of channels is fixed.
    channels = code_width(width) if isinstance(width, int) else width
    codes = builder.op(
        TOKEN_CODES, TOKEN_CODES, [features], _INT8, (images, tokens, channels), PLUGIN_ATTRIBUTES, domain=DOMAIN
    )
    shape: tuple[Dim, ...] = (images, tokens, tokens)
    products = builder.op(TOKEN_PRODUCTS, TOKEN_PRODUCTS, [codes], _FLOAT, shape, PLUGIN_ATTRIBUTES, domain=DOMAIN)
    kept = tuple(node.outputs[0].shape or ())
    name, inputs = (SELECT_DPP, [products, score]) if select == "dpp" else (SELECT_MAXMIN, [products])
    attributes = {"kept": _kept(node) or 0, **PLUGIN_ATTRIBUTES}
    outputs = 3 if select == "dpp" else 2
    builder.op(name, name, inputs, _INT32, kept, attributes, domain=DOMAIN, outputs=outputs)
    chosen = builder.nodes[-1].outputs
    chosen[1].dtype, chosen[1].shape = _INT32, ir.Shape(kept)
    if select == "dpp":
        chosen[2].dtype = _FLOAT
    for old, new, of in zip(node.outputs, chosen, ("indices", "order"), strict=False):
        # Plugins give 32 bits, which the operators behind them do not take.
        replace_value(old, builder.op(f"{of}/Cast", "Cast", [new], _INT64, kept, {"to": int(_INT64)}))
    model.graph.insert_before(node, builder.nodes)
