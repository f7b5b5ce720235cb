"""Traces each tiny model once: torch.onnx.export takes most of a test's time and depends on the configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import pytest

from qavp_export import pipeline
from qavp_export.tracing import PARAMETER
from qavp_export.tracing.trace import WeightSource

Graphs = dict[str, ir.Model]


@contextmanager
def traced_once() -> Iterator[Callable[..., Graphs]]:
    """Makes `pipeline.trace` reuse the graphs of equal configurations; weights are bound anew. Yields the original."""
    original = pipeline.trace_components
    cache: dict[str, Graphs] = {}

    def trace(
        family: Any, plan: Any, model: Any, mode: Any, weights: WeightSource, progress: Any, clip: Any = None
    ) -> dict[str, ir.Model]:
        key = repr([model.config.to_dict(), None if clip is None else clip.config.to_dict()])
        if key not in cache:
            cache[key] = original(family, plan, model, mode, weights, progress, clip)
        graphs = {name: graph.clone() for name, graph in cache[key].items()}
        for graph in graphs.values():
            for value in graph.graph.initializers.values():
                if PARAMETER in value.metadata_props and value.shape is not None:
                    value.const_value = weights(value.metadata_props[PARAMETER], value.shape.numpy())
        return graphs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace_components", trace)
        yield original
