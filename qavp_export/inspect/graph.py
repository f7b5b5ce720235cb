"""An overview of a bundle's graphs: their modules in order, equal layers as one, and where pruning and Q/DQ sit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx

from qavp_export.engines.ort.session import graph_path
from qavp_export.inspect.taps import load_graph
from qavp_export.manifest import Manifest, TensorSpec

Kind: TypeAlias = Literal["plain", "prune", "quantized", "rotation"]

# Operators that move or shape values, quantize, or turn positions into angles once for all layers: not named.
# fmt: off
_SILENT = frozenset((
    "Cast", "Concat", "Constant", "ConstantOfShape", "Cos", "DequantizeLinear", "Equal", "Expand", "Gather",
    "GroupScale", "Identity", "QuantizeLinear", "Range", "Reshape", "ScatterND", "Shape", "Sin", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "TwoLevelScale", "Unsqueeze", "Where",
))
# fmt: on
_PRUNE, _ROTATION, _WEIGHT = "prune", "rotation", "weight"
_OUTER = "model"


@dataclass(frozen=True)
class Block:
    """Some nodes of a graph that belong together.

    Attributes:
        name: The module's path, without what all share.
        kind: What is special about it.
        nodes: How many nodes it has, all repetitions together.
        details: What it computes, a line each.
        repeated: Which layers it stands for, for example `0-2, 4`; empty if it stands for itself.
        count: How many these are.
        inner: What each layer is made of.
    """

    name: str
    kind: Kind
    nodes: int
    details: tuple[str, ...]
    repeated: str = ""
    count: int = 1
    inner: tuple[Block, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the block as JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "nodes": self.nodes,
            "details": list(self.details),
            "layers": self.repeated,
            "count": self.count,
            "inner": [block.to_dict() for block in self.inner],
        }


@dataclass(frozen=True)
class Overview:
    """One component.

    Attributes:
        name: The component.
        nodes: Nodes of its graph; those inside functions are not counted.
        inputs: What it takes, name and shape.
        outputs: What it returns, name and shape.
        blocks: What it is made of, in the order of computation.
    """

    name: str
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    blocks: tuple[Block, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the overview as JSON values."""
        return {
            "component": self.name,
            "nodes": self.nodes,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "blocks": [block.to_dict() for block in self.blocks],
        }


@dataclass(frozen=True)
class _Facts:
    """What is known of nodes, by name.

    Attributes:
        precision: Realized precision of linear layers.
        quiet: Nodes that are not named: they move values or work out shapes.
    """

    precision: Mapping[str, str]
    quiet: frozenset[str]


@dataclass
class _Scope:
    """A module: its own nodes and its modules, in the order of first appearance."""

    path: tuple[str, ...]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    children: dict[str, _Scope] = field(default_factory=dict)

    def all_nodes(self) -> Iterator[onnx.NodeProto]:
        yield from self.nodes
        for child in self.children.values():
            yield from child.all_nodes()

    def signature(self, facts: _Facts) -> Any:
        """What two layers must have in common to be shown as one: operators that are named, precisions, by module."""
        return tuple(
            sorted(
                (module_path(node)[len(self.path) :], node.op_type, facts.precision.get(node.name, ""))
                for node in self.all_nodes()
                if node.name not in facts.quiet
            )
        )


def overview(bundle: Path, manifest: Manifest) -> list[Overview]:
    """Reads the graphs of a bundle, without their weights.

    Raises:
        BundleError: A graph is missing or damaged.
    """
    found = []
    for name, component in manifest.components.items():
        model = load_graph(graph_path(bundle, manifest, name))
        prefix = f"{name}:"
        precision = {
            layer.removeprefix(prefix): value for layer, value in manifest.precision.items() if layer.startswith(prefix)
        }
        blocks = blocks_of(model.graph.node, precision, {value.name for value in model.graph.input})
        inputs, outputs = _ports(component.inputs), _ports(component.outputs)
        found.append(Overview(name, len(model.graph.node), inputs, outputs, blocks))
    return found


def blocks_of(
    nodes: Iterable[onnx.NodeProto], precision: Mapping[str, str], inputs: Collection[str] = ()
) -> tuple[Block, ...]:
    """Sorts nodes into blocks by the modules that their names tell.

    A module that holds numbered layers is opened; any other is one block. Layers of the same operators and precisions
    are one block, which is opened one level further.

    Args:
        nodes: The nodes of one graph, in order, named `/<module path>/<operator>...`.
        precision: Realized precision of linear layers by node name.
        inputs: Names of the graph's inputs.
    """
    root, places, nodes = _Scope(()), {}, list(nodes)
    facts = _Facts(precision, frozenset(_quiet(nodes, inputs)))
    for place, node in enumerate(nodes):
        scope = root
        for part in module_path(node):
            scope = scope.children.setdefault(part, _Scope((*scope.path, part)))
        scope.nodes.append(node)
        places[node.name] = place
    found = sorted(_open(root, facts), key=lambda pair: _first(pair[0], places))
    return tuple(block for _, block in found)


def _quiet(nodes: Sequence[onnx.NodeProto], inputs: Collection[str]) -> Iterator[str]:
    """Yields the nodes that need no name: they move values, or compute with nothing but shapes."""
    made = {*inputs, *(name for node in nodes if node.op_type != "Constant" for name in node.output)}
    shapes: set[str] = set()
    for node in nodes:
        of = [name for name in node.input if name in made]
        if node.op_type == "Shape" or (of and shapes.issuperset(of)):
            shapes.update(node.output)
            yield node.name
        elif node.op_type in _SILENT:
            yield node.name


def _first(scopes: Sequence[_Scope], places: Mapping[str, int]) -> int:
    """Where the computation of a block begins; constants, and what prepares weights, may stand anywhere."""
    nodes = [node for scope in scopes for node in scope.all_nodes()]
    steps = [node for node in nodes if node.op_type != "Constant" and _WEIGHT not in node.name.split("/")]
    return min(places[node.name] for node in steps or nodes)


def module_path(node: onnx.NodeProto) -> tuple[str, ...]:
    """Returns the modules that a node's name gives: all before the operator, which alone begins with a capital.

    The outermost, `model`, is left out, and `layers.3` is the fourth of `layers`.
    """
    path: list[str] = []
    for part in node.name.strip("/").split("/")[:-1]:
        if part[:1].isupper():
            break
        path.append(part)
    return tuple(piece for part in path[path[:1] == [_OUTER] :] for piece in _numbered(part))


def _numbered(part: str) -> tuple[str, ...]:
    stem, _, number = part.rpartition(".")
    return (stem, number) if stem and number.isdigit() else (part,)


def _open(scope: _Scope, facts: _Facts) -> Iterator[tuple[Sequence[_Scope], Block]]:
    """Yields the blocks of a scope, each with what it is made of."""
    own = _Scope(scope.path, scope.nodes)
    if block := _leaf(own, facts, own=True):
        yield [own], block
    layers = [child for name, child in scope.children.items() if name.isdigit()]
    yield from _layers(scope.path, layers, facts)
    for name, child in scope.children.items():
        if name.isdigit():
            continue
        if _has_layers(child) or name == _PRUNE:
            yield from _open(child, facts)
        elif block := _leaf(child, facts):
            yield [child], block


def _has_layers(scope: _Scope) -> bool:
    return any(name.isdigit() or _has_layers(child) for name, child in scope.children.items())


def _layers(path: tuple[str, ...], layers: Sequence[_Scope], facts: _Facts) -> Iterator[tuple[Sequence[_Scope], Block]]:
    groups: dict[Any, list[_Scope]] = {}
    for layer in layers:
        groups.setdefault(layer.signature(facts), []).append(layer)
    for alike in groups.values():
        inner = tuple(_parts(alike[0], facts))
        nodes = sum(1 for layer in alike for _ in layer.all_nodes())
        kind: Kind = "quantized" if any(block.kind == "quantized" for block in inner) else "plain"
        numbers = _ranges([int(layer.path[-1]) for layer in alike])
        yield alike, Block("/".join(path), kind, nodes, (), numbers, len(alike), inner)


def _parts(layer: _Scope, facts: _Facts) -> Iterator[Block]:
    for child in [*layer.children.values(), _Scope(layer.path, layer.nodes)]:
        block = _leaf(child, facts)
        if block is not None and block.details:
            name = child.path[-1] if child.path != layer.path else "(residual)"
            yield Block(name, block.kind, block.nodes, block.details)


def _leaf(scope: _Scope, facts: _Facts, *, own: bool = False) -> Block | None:
    """A block of all nodes of a scope; None if these only move values and stand in no module of their own."""
    nodes = list(scope.all_nodes())
    details = tuple(_details(scope, nodes, facts))
    if not details and (own or all(node.op_type == "Constant" for node in nodes)):
        return None
    rotated = any(_ROTATION in node.name.split("/") for node in nodes)
    runs_in = {facts.precision[node.name] for node in nodes if node.name in facts.precision}
    quantized = any(not value.startswith(("float", "bfloat")) for value in runs_in) or any(
        node.op_type == "QuantizeLinear" for node in nodes
    )
    kind: Kind = "plain"
    if scope.path[:1] == (_PRUNE,):
        kind = "prune"
    elif quantized:
        kind = "quantized"
    elif rotated:
        kind = "rotation"
    return Block(_label(scope.path, own=own), kind, len(nodes), details)


def _details(scope: _Scope, nodes: Sequence[onnx.NodeProto], facts: _Facts) -> Iterator[str]:
    """Says what nodes compute: linear layers by precision, other operators, rotations, quantizers."""
    linear: dict[str, list[str]] = {}
    for node in nodes:
        if node.name in facts.precision:
            linear.setdefault(facts.precision[node.name], []).append((*scope.path, *module_path(node))[-1])
    for value, names in linear.items():
        yield f"{', '.join(names)}: {value}"
    # What prepares a weight is no step of the computation; a bias belongs to its linear layer.
    layers = {module_path(node) for node in nodes if node.name in facts.precision}
    steps = [node for node in nodes if not {_WEIGHT, _ROTATION} & set(node.name.split("/"))]
    operators = Counter(
        node.op_type for node in steps if node.name not in facts.quiet and module_path(node) not in layers
    )
    if not operators and not linear:
        operators = Counter(node.op_type for node in steps if node.op_type == "Gather")
    if operators:
        yield ", ".join(name if count == 1 else f"{name} x{count}" for name, count in operators.items())
    rotations = [node for node in nodes if node.op_type == "MatMul" and _ROTATION in node.name.split("/")]
    if rotations:
        yield f"Hadamard rotation of {', '.join(sorted({_rotated(node) for node in rotations}))}"
    quantizers = (
        _counted(nodes, "QuantizeLinear", "Q/DQ of", "activation", weights=False),
        _counted(nodes, "DequantizeLinear", "DQ of", "weight", weights=True),
    )
    if any(quantizers):
        yield ", ".join(filter(None, quantizers))


def _counted(nodes: Sequence[onnx.NodeProto], operator: str, what: str, of: str, *, weights: bool) -> str:
    """`Q/DQ of 2 activations`; empty for none."""
    count = sum(node.op_type == operator and (_WEIGHT in node.name.split("/")) == weights for node in nodes)
    return f"{what} {count} {of}{'s' * (count > 1)}" if count else ""


def _rotated(node: onnx.NodeProto) -> str:
    """Returns whose input a rotation turns, or what it turns."""
    path = module_path(node)
    return f"the input of {path[-1]}" if _ROTATION not in path else path[path.index(_ROTATION) - 1]


def _label(path: tuple[str, ...], *, own: bool = False) -> str:
    name = "/".join(path)
    return f"({name or 'top level'})" if own else name


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2, 4`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _ports(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    cache = [spec for spec in specs if spec.name.startswith(("past_key_values.", "present."))]
    shown = [f"{spec.name} [{', '.join(map(str, spec.shape))}]" for spec in specs if spec not in cache]
    if cache:
        shape = ", ".join(map(str, cache[0].shape))
        shown.append(f"{cache[0].name.split('.')[0]}.* [{shape}] x{len(cache)}")
    return tuple(shown)
