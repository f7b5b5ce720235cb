"""Decoders to rewrite: traced from a configuration with random weights and no checkpoint, or written by hand."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.families import FAMILIES, Plan
from qavp_export.passes import FoldWeightTransposes
from qavp_export.tracing import build_skeleton, trace
from tests.models.tiny import TinySpec, _config
from tests.passes.graphs import graph, session

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Steps:
    """What a decoder yields for a prefill and one more token on its cache.

    Attributes:
        logits: `[B,S+1,V]`.
        present: The cache after both, by output name.
    """

    logits: Float32
    present: Mapping[str, Array]


def trace_decoder(spec: TinySpec, changes: Mapping[str, Any] | None = None) -> tuple[ir.Model, Plan]:
    """Traces only the decoder, weights folded to `[K,N]`; `changes` are fields of the text configuration.

    Every parameter has random values of its own, gains and biases too, so that none can stand for another.
    """
    config = _config(spec)
    for name, value in (changes or {}).items():
        setattr(config.text_config, name, value)
    family = FAMILIES["llava"]
    plan = family.plan(config)
    skeleton, mode = build_skeleton(config)
    modules = {id(module): name for name, module in skeleton.named_modules()}
    with mode:
        request = trace._decoder_request(family.decoder(skeleton), plan, family.decoder_inputs(plan))
    model = trace._trace(request, mode, modules, random_weight)
    FoldWeightTransposes()(model)
    return model, plan


@cache
def _llama() -> tuple[ir.Model, Plan]:
    return trace_decoder(TinySpec())


def llama_decoder() -> tuple[ir.Model, Plan]:
    """A copy of a traced Llama decoder: two layers, GQA, hidden size 96, heads of 16. It is traced once."""
    model, plan = _llama()
    return model.clone(), plan


def random_weight(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """A matrix that keeps the size of what it multiplies, a gain around 1, or a bias."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 2:
        draw *= 1.5 / np.sqrt(shape[1])
    elif name.endswith("bias"):
        draw *= 0.3
    else:
        draw = 1 + 0.3 * draw
    return ir.Tensor(draw.astype(np.float32), name=name)


def run_steps(model: ir.Model, plan: Plan, embeds: Float32) -> Steps:
    """Runs a decoder on `embeds [B,S+1,D]`: a left-padded prefill of S tokens, then the last one on the cache."""
    batch, length, _ = embeds.shape
    mask = np.ones((batch, length), np.int64)
    mask[0, :2] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    shape = (batch, plan.num_key_value_heads, 0, plan.head_dim)
    past = {
        f"past_key_values.{layer}.{part}": np.zeros(shape, np.float32)
        for layer in range(plan.num_layers)
        for part in ("key", "value")
    }
    runner = session(model, optimize=False)
    names = [output.name for output in runner.get_outputs()]
    logits, present = [], past
    for part in (slice(0, length - 1), slice(length - 1, length)):
        feeds = {
            "inputs_embeds": embeds[:, part],
            "attention_mask": mask[:, : part.stop],
            "position_ids": positions[:, part],
            **{name.replace("present.", "past_key_values."): value for name, value in present.items()},
        }
        outputs = dict(zip(names, runner.run(names, feeds), strict=True))
        logits.append(outputs.pop("logits"))
        present = outputs
    return Steps(np.concatenate(logits, axis=1), present)


def hand_made(inputs: str, outputs: str, body: str, weights: Mapping[str, Array]) -> ir.Model:
    """A graph in ONNX's text form whose weights are initializers."""
    declared = [f"float[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items()]
    model = graph(f"({', '.join([inputs, *declared])}) => ({outputs})", body)
    for value in list(model.graph.inputs):
        if value.name not in weights:
            continue
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = ir.Tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    return model
