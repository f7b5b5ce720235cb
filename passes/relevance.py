"""Graphs whose tokens are not the vision tower's patches: how the patches' relevance becomes the tokens'.

Such a graph is traced with one more input, `patch_relevance [T,P]` FLOAT, and one more output, `token_relevance [B,N]`:
the spatial operations that the features go through, on one channel. The pruning passes consume both.

A graph that compares its patches with a question has an input `text_input_ids [B,L]` INT64, and its `token_relevance`
is what the scorer `text` scores.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qavp_export.errors import GraphError
from qavp_export.passes._builder import Dim
from qavp_export.passes._infra import list_shape

PATCH_RELEVANCE = "patch_relevance"
TOKEN_RELEVANCE = "token_relevance"
TEXT_INPUT_IDS = "text_input_ids"


def relevance_ports(model: ir.Model) -> tuple[ir.Value, ir.Value] | None:
    """Finds the input `patch_relevance` and the output `token_relevance`; None if the graph has not got both."""
    given = [value for value in model.graph.inputs if value.name == PATCH_RELEVANCE]
    made = [value for value in model.graph.outputs if value.name == TOKEN_RELEVANCE]
    return (given[0], made[0]) if given and made else None


def take_relevance(model: ir.Model) -> ir.Value:
    """Removes the output `token_relevance` from the graph's signature, and returns it.

    Args:
        model: A graph whose own nodes compute it, see `check_relevance`.
    """
    made = next(value for value in model.graph.outputs if value.name == TOKEN_RELEVANCE)
    model.graph.outputs.remove(made)
    return made


def check_relevance(model: ir.Model) -> None:
    """Checks that a graph computes the relevance of its tokens itself.

    Raises:
        GraphError: It does not.
    """
    made = [value for value in model.graph.outputs if value.name == TOKEN_RELEVANCE]
    if not made or relevance_ports(model) is not None:
        raise GraphError(
            f"semantic 'text' needs a graph that computes the relevance of its tokens to a question, as an output "
            f"{TOKEN_RELEVANCE!r} [B,N]; this one does not: use 'cls', 'received' or 'norm'"
        )


def patch_grid(given: ir.Value) -> tuple[Dim, Dim]:
    """The images and patches of the input `patch_relevance [T,P]`.

    Raises:
        GraphError: It has another rank.
    """
    if given.shape is None or given.shape.rank() != 2:
        raise GraphError(f"{PATCH_RELEVANCE!r} has shape {list_shape(given)}; expected [images, patches]")
    return given.shape[0], given.shape[1]


def connect_relevance(model: ir.Model, relevance: ir.Value) -> ir.Value:
    """Replaces the input by a value of the graph, and removes input and output from the graph's signature.

    Args:
        model: A graph that has both.
        relevance: Relevance of patches `[T,P]`, FLOAT. The graph needs sorting afterwards.

    Returns:
        Relevance of tokens `[B,N]`, FLOAT.

    Raises:
        ValueError: The graph has not got both.
    """
    ports = relevance_ports(model)
    if ports is None:
        raise ValueError(f"the graph lacks the input {PATCH_RELEVANCE!r} or the output {TOKEN_RELEVANCE!r}")
    given, made = ports
    for use in list(given.uses()):
        use.node.replace_input_with(use.idx, relevance)
    model.graph.inputs.remove(given)
    model.graph.outputs.remove(made)
    return made


def drop_relevance(model: ir.Model) -> None:
    """Removes input, output and what lies between, where a graph has them: nothing reads the attention."""
    ports = relevance_ports(model)
    if ports is None:
        return
    given, made = ports
    model.graph.outputs.remove(made)
    RemoveUnusedNodesPass()(model)
    model.graph.inputs.remove(given)
