"""What the passes share: a result that says what happened, and checks that fail as `GraphError`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError
from onnx_ir.passes.common import ShapeInferencePass

from qavp_export.errors import GraphError, QavpError
from qavp_export.passes._builder import Dim

_STATIC = "export with a static vision grid, or name the dynamic axes"
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


_T = TypeVar("_T")


class UnknownShapeError(GraphError):
    """A size that a pass needs is not in the graph; shape inference may find it."""


@dataclass(frozen=True)
class Refusal:
    """A place that looked right and was left alone.

    Attributes:
        node_name: The node.
        reason: Why, in one line.
    """

    node_name: str
    reason: str


@dataclass
class RewriteResult(PassResult):
    """What a rewrite did.

    Attributes:
        matched: How many places were rewritten.
        refused: The places that looked right and were not, with the reason.
    """

    matched: int = 0
    refused: list[Refusal] = field(default_factory=list)


class RewritePass(InPlacePass):
    """An in-place pass that reports matches and refusals.

    The contract is onnx-ir's: `requires` checks the model, `call` rewrites it, `ensures` checks what came
    out. An error of this project raised in `requires` or `ensures` reaches the caller as itself, not wrapped,
    so that users see its one line.
    """

    def __call__(self, model_or_result: ir.Model | PassResult, /) -> RewriteResult:
        """Run the pass.

        Args:
            model_or_result: The model, or the result of the pass before.

        Returns:
            The same model, rewritten, with the number of matches and the refusals.

        Raises:
            QavpError: A condition of the pass does not hold; `GraphError` where the graph lacks something.
        """
        try:
            result = super().__call__(model_or_result)
        except (PreconditionError, PostconditionError) as error:
            if isinstance(error.__cause__, QavpError):
                raise error.__cause__ from None
            raise
        if not isinstance(result, RewriteResult):
            raise TypeError(f"{type(self).__name__}.call must return a RewriteResult")
        return result


def require_opset(model: ir.Model, minimum: int) -> None:
    """Check the version of the standard operators that a model imports.

    Raises:
        GraphError: It is older than `minimum`.
    """
    opset = model.graph.opset_imports.get("")
    if opset is None or opset < minimum:
        raise GraphError(
            f"graph {model.graph.name!r} uses opset {opset}; opset {minimum} or newer is needed: export "
            "again or convert it with onnx.version_converter"
        )


def find_value(model: ir.Model, name: str) -> ir.Value:
    """Find a value of the main graph: an input, or what a node computes.

    Raises:
        GraphError: There is none of that name.
    """
    for value in _values(model.graph):
        if value.name == name:
            return value
    outputs = [value.name for value in model.graph.outputs]
    raise GraphError(f"graph {model.graph.name!r} has no value named {name!r}; its outputs are {outputs}")


def require_free_name(model: ir.Model, name: str) -> None:
    """Check that no value of the main graph has a name yet.

    Raises:
        GraphError: One has; the pass may have run already.
    """
    taken = (*_values(model.graph), *model.graph.initializers.values())
    if any(value.name == name for value in taken):
        raise GraphError(f"the graph already has a value named {name!r}; was it pruned before?")


def require_features(model: ir.Model, name: str) -> ir.Value:
    """Find image features and check their type as far as it is known.

    Raises:
        GraphError: There is no such value, or it is not floating point.
    """
    value = find_value(model, name)
    if value.dtype is not None and value.dtype not in _FLOATS:
        raise GraphError(f"{name!r} has type {value.dtype.name}; image features are FLOAT, FLOAT16, BFLOAT16")
    return value


def token_grid(value: ir.Value) -> tuple[Dim, int]:
    """Tokens and channels of image features `[B,N,D]`: a number or a named dimension, and a number.

    Raises:
        GraphError: The value is not of rank 3; `UnknownShapeError` where N or D is not known.
    """
    if value.shape is None:
        raise UnknownShapeError(f"{value.name!r} has no known shape [B,N,D]; {_STATIC}")
    if value.shape.rank() != 3:
        raise GraphError(f"{value.name!r} has shape {list_shape(value)}; image features are [B,N,D]")
    tokens, width = value.shape[1], value.shape[2]
    if not isinstance(width, int):
        raise UnknownShapeError(f"{value.name!r} has shape {list_shape(value)}: D must be a number; {_STATIC}")
    # What has no name yet may turn out to be a number.
    if isinstance(tokens, ir.SymbolicDim) and tokens.value is None:
        raise UnknownShapeError(f"{value.name!r} has shape {list_shape(value)}, in which N is not known; {_STATIC}")
    return tokens, width


def with_shapes(model: ir.Model, plan: Callable[[], _T]) -> _T:
    """Call `plan`; where it misses a shape, infer shapes and call it again.

    Args:
        model: The model whose shapes are filled in; no weight is read.
        plan: Reads the model and does not change it.

    Returns:
        What `plan` returned.

    Raises:
        GraphError: From `plan`.
    """
    try:
        return plan()
    except UnknownShapeError:
        infer_shapes(model)
        return plan()


def infer_shapes(model: ir.Model) -> None:
    """Fill in the shapes that ONNX shape inference finds; no weight is read."""
    ShapeInferencePass(check_type=False, strict_mode=False)(model)


def insert_behind(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes right behind the one that computes a value; in front of all nodes for a graph input."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    elif len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)


def list_shape(value: ir.Value) -> str:
    """A value's shape as users read it: `[batch,16,64]`."""
    return "unknown" if value.shape is None else str(value.shape).replace("'", "")


def upstream(value: ir.Value) -> set[ir.Node]:
    """All nodes that a value depends on."""
    seen: set[ir.Node] = set()
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(node.predecessors())
    return seen


def downstream(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """Nodes and all that depend on them, each once."""
    seen: dict[ir.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen[node] = None
            pending.extend(node.successors())
    return list(seen)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
