"""Cuts nodes of a function into several that each run as one kernel."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qavp_export.errors import GraphError
from qavp_export.passes._infra import Refusal, RewriteResult
from qavp_export.passes._linear import name_of
from qavp_export.passes.functions import DOMAIN


def cut_nodes(
    model: ir.Model,
    op_type: str,
    why_not: Callable[[ir.Node], str | None],
    cut: Callable[[ir.Model, ir.Node, ir.Function], None],
) -> RewriteResult:
    """Cuts every node of a function that can be cut.

    Args:
        model: The model; it is changed.
        op_type: The function's name.
        why_not: Returns why a node cannot be cut, or None.
        cut: Puts other nodes in a node's place.

    Returns:
        How many nodes were cut, and which were not.

    Raises:
        GraphError: A node's function is not in the model.
    """
    matched, refused = 0, []
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, op_type)]:
        reason = why_not(node)
        if reason is not None:
            refused.append(Refusal(name_of(node), reason))
            continue
        function = model.functions.get(node.op_identifier())
        if function is None:
            raise GraphError(f"the function of {name_of(node)} is not in the model")
        cut(model, node, function)
        matched += 1
    return RewriteResult(model, modified=matched > 0, matched=matched, refused=refused)
