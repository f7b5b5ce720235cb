"""A decoder's graph with its first layers only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qavp_export.errors import GraphError

_LAYER = re.compile(r"/layers\.(\d+)/")
_CACHE = re.compile(r"(?:past_key_values|present)\.(\d+)\.")


@contextmanager
def truncated_decoder(graph: Path, layers: int) -> Iterator[Path]:
    """Writes a graph without the layers from `layers` on, beside the decoder, whose weights it shares.

    Args:
        graph: The decoder's graph.
        layers: Layers that are left.

    Yields:
        The path of the truncated graph, which is removed in the end.

    Raises:
        GraphError: More than one value leads from a layer to the next.
    """
    model = ir.load(graph)
    _truncate(model, layers)
    path = graph.with_name("truncated.onnx")
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _truncate(model: ir.Model, layers: int) -> None:
    graph = model.graph
    last = max((number for node in graph if (number := _layer_of(node)) is not None), default=-1)
    if last < layers:
        return
    _leaving(graph, last).replace_all_uses_with(_leaving(graph, layers - 1))
    graph.outputs[:] = [value for value in graph.outputs if _cache_layer(value) < layers]
    RemoveUnusedNodesPass()(model)
    caches = [value for value in graph.inputs if _cache_layer(value) >= 0]
    for value in caches:
        if _cache_layer(value) >= layers:
            # Its sizes may be read for all layers: the exporter takes them from any of the caches, which are alike.
            value.replace_all_uses_with(caches[0])
    graph.inputs[:] = [value for value in graph.inputs if _cache_layer(value) < layers]


def _leaving(graph: ir.Graph, layer: int) -> ir.Value:
    """Returns the value that leads from a layer to what follows it."""
    found = {
        value: None
        for node in graph
        if _layer_of(node) == layer
        for value in node.outputs
        if any(_layer_of(user) != layer for user, _ in value.uses())
    }
    if len(found) != 1:
        raise GraphError(f"{len(found)} values lead from layer {layer} of graph {graph.name!r} to the next, expected 1")
    return next(iter(found))


def _layer_of(node: ir.Node) -> int | None:
    match = _LAYER.search(node.name or "")
    return int(match.group(1)) if match else None


def _cache_layer(value: ir.Value) -> int:
    match = _CACHE.match(value.name or "")
    return int(match.group(1)) if match else -1
