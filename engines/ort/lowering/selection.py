"""Lowers the selection of diverse tokens: similarities as products of 8-bit integers, in a graph of its own or not."""

from __future__ import annotations

from typing import get_args

import onnx_ir as ir

from qavp_export.engines.lowering.split import remove_unused
from qavp_export.numerics.diverse import Diversity
from qavp_export.passes._infra import downstream, token_grid, upstream
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
    for node in _selections(model):
        _, width = token_grid(input_of(node, 0))
        for select in _RULES:
            if node.attributes["select"].as_string() == select:
                function = select_diverse(select, width, model.graph.opset_imports[""], "cpu")
                model.functions[function.identifier()] = function


def split_selection(model: ir.Model) -> tuple[ir.Model, ir.Model] | None:
    """Cuts a vision encoder in front of the selection of diverse tokens.

    Constants and weights that the selection needs go with it. What else it reads is an output of the first part and an
    input of the second, or an input of the encoder that the second part takes itself.

    Args:
        model: A canonical vision encoder; it is not changed.

    Returns:
        The encoder up to the features and their score, and the selection with all that depends on it; together they
        have the encoder's outputs. None where no diverse tokens are selected.
    """
    dependents = set(downstream(_selections(model)))
    if not dependents:
        return None
    crossing = _read_from_outside(model.graph, dependents)
    behind = [value for value in model.graph.outputs if value.producer() in dependents]
    before = [value for value in model.graph.outputs if value.producer() not in dependents]
    encoder, selection = model.clone(), model.clone()
    values = ir.convenience.create_value_mapping(encoder.graph)
    encoder.graph.outputs[:] = [values[str(value.name)] for value in dict.fromkeys([*before, *crossing])]
    values = ir.convenience.create_value_mapping(selection.graph)
    selection.graph.outputs[:] = [values[str(value.name)] for value in behind]
    for value in crossing:
        entry = ir.Value(name=value.name, shape=value.shape, type=value.type)
        ir.convenience.replace_all_uses_with(values[str(value.name)], entry)
        selection.graph.inputs.append(entry)
    remove_unused(encoder)
    remove_unused(selection)
    return encoder, selection


def _selections(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, SELECT_DIVERSE)]


def _read_from_outside(graph: ir.Graph, nodes: set[ir.Node]) -> list[ir.Value]:
    """Returns what nodes read that others compute from the graph's inputs, in the order of the graph."""
    read = dict.fromkeys(value for node in graph if node in nodes for value in node.inputs if value is not None)
    return [value for value in read if value.producer() not in nodes and _depends_on_input(value)]


def _depends_on_input(value: ir.Value) -> bool:
    """Whether nodes compute a value from inputs of the graph; False for such an input itself."""
    return any(read is not None and read.is_graph_input() for node in upstream(value) for read in node.inputs)
