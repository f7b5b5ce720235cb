"""Runs the exported decoder and shows what its quantized layers see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import TOKEN_TYPES, EngineOptions, FloatArray
from qavp_export.engines.ort.session import session_options
from qavp_export.parity.prompts import Prompts


@dataclass(frozen=True)
class Run:
    """A prefill and one more token on its cache.

    Attributes:
        logits: `[B,S+1,V]`.
        activations: Quantized activations by value name, for both steps: `[B,S,K]` and `[B,1,K]`.
    """

    logits: FloatArray
    activations: Mapping[str, tuple[FloatArray, FloatArray]]


def prefill_feeds(shapes: Mapping[str, Sequence[Any]], embeds: FloatArray, prompts: Prompts) -> dict[str, Any]:
    """Returns the decoder's inputs for a prefill on an empty cache.

    Args:
        shapes: Shapes of the graph's inputs by name.
        embeds: Embedded prompts `[B,S,D]`.
        prompts: The prompts.
    """
    feeds: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": prompts.mask, "position_ids": prompts.positions}
    for name, shape in shapes.items():
        if name.startswith("past_key_values."):
            feeds[name] = np.zeros((len(embeds), shape[1], 0, shape[3]), np.float32)
        elif name == TOKEN_TYPES:
            feeds[name] = prompts.token_type_ids
    return feeds


def run_decoder(graph: Path, embeds: FloatArray, next_embeds: FloatArray, prompts: Prompts, taps: list[str]) -> Run:
    """Runs the canonical decoder without graph optimization: the arithmetic as it is written.

    Args:
        graph: The decoder's graph.
        embeds: Embedded prompts `[B,S,D]`.
        next_embeds: Embedded next tokens `[B,1,D]`.
        prompts: The prompts.
        taps: Names of values to return.

    Returns:
        Logits and tapped values.
    """
    session = _tapped_session(graph, taps)
    outputs = [output.name for output in session.get_outputs()]
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = [name for name in shapes if name.startswith("past_key_values.")]
    feeds = prefill_feeds(shapes, embeds, prompts)
    prefill = dict(zip(outputs, session.run(outputs, feeds), strict=True))
    feeds = {name: prefill[name.replace("past_key_values.", "present.")] for name in past}
    feeds |= {
        "inputs_embeds": next_embeds,
        "attention_mask": prompts.grown_mask,
        "position_ids": prompts.next_positions,
    }
    feeds |= {name: np.zeros_like(prompts.next_ids) for name in shapes if name == TOKEN_TYPES}
    step = dict(zip(outputs, session.run(outputs, feeds), strict=True))
    return Run(
        logits=np.concatenate([prefill["logits"], step["logits"]], axis=1),
        activations={tap: (prefill[tap], step[tap]) for tap in taps},
    )


def _tapped_session(graph: Path, taps: list[str]) -> ort.InferenceSession:
    model = onnx.load(graph, load_external_data=False)
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[tap] for tap in taps)
    # Beside the graph, because external data is found relative to it.
    copy = graph.with_name("tapped.onnx")
    options = session_options(EngineOptions(graph_optimization="disable"))
    # An arena would keep what each dequantized weight took, and by priority all are dequantized first.
    options.enable_cpu_mem_arena = False
    options.execution_order = ort.ExecutionOrder.DEFAULT
    try:
        onnx.save(model, copy)
        return ort.InferenceSession(copy, options, providers=["CPUExecutionProvider"])
    finally:
        copy.unlink(missing_ok=True)
