"""Lowers the selection of diverse tokens: similarities as products of 8-bit integers."""

from __future__ import annotations

from typing import get_args

import onnx_ir as ir

from qavp_export.numerics.diverse import Diversity
from qavp_export.passes._infra import token_grid
from qavp_export.passes._linear import input_of
from qavp_export.passes.functions import DOMAIN
from qavp_export.passes.select_diverse import SELECT_DIVERSE, select_diverse

_RULES: tuple[Diversity, ...] = get_args(Diversity)


def lower_selection(model: ir.Model) -> None:
    """Gives the function `SelectDiverse`, where a vision encoder has it, the form that ONNX Runtime's CPU runs fastest.

    It chooses the same tokens: what it adds up are integers that fit either form.

    Args:
        model: The vision encoder; changed in place.

    Raises:
        GraphError: The features have no known shape.
    """
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, SELECT_DIVERSE):
            continue
        _, width = token_grid(input_of(node, 0))
        for select in _RULES:
            if node.attributes["select"].as_string() == select:
                function = select_diverse(select, width, model.graph.opset_imports[""], "cpu")
                model.functions[function.identifier()] = function
