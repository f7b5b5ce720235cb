"""Runs the decoder that TensorRT builds with ONNX Runtime, as the engine's session does: right-padded, on one cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qavp_export.engines.tensorrt.lowering.capabilities import TENSORRT_RTX, Capabilities
from qavp_export.engines.tensorrt.lowering.decoder import lower_decoder
from qavp_export.families import Plan
from tests.engines.lowered import Array
from tests.engines.prompts import Prompt

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
HALVES = (_HALF, ir.DataType.BFLOAT16)


def open_as_it_is(model: ir.Model) -> ort.InferenceSession:
    """Opens a graph operator for operator: fused, products with 4-bit weights would round their other input."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # It warns that its TensorScatter copies.
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


def in_float32(model: ir.Model) -> ir.Model:
    """Returns a graph that computes in float32 where it computed in 16 bits: what is left is structure."""
    model = model.clone()
    for node in model.graph:
        cast = node.attributes.get("to")
        if cast is not None and cast.as_int() in HALVES:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
    # What is gathered from a table that is stored so stays.
    computed = [output for node in model.graph if node.op_type != "Gather" for output in node.outputs]
    for value in (*model.graph.inputs, *computed):
        if value.dtype in HALVES:
            value.type = ir.TensorType(_FLOAT)
    for value in list(model.graph.initializers.values()):
        if value.dtype in HALVES and value.const_value is not None and not _is_cast(value):
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(_FLOAT)
    return model


def _is_cast(value: ir.Value) -> bool:
    return any(node.op_type in ("Cast", "Gather") for node in value.consumers())


@dataclass
class TrtDecoder:
    """A lowered decoder, opened.

    Attributes:
        session: The graph.
        plan: The decoder's sizes.
        capacity: Tokens of its cache.
        cache: Keys and values by input name.
        lengths: Tokens of each sequence in it.
    """

    session: ort.InferenceSession
    plan: Plan
    capacity: int
    cache: dict[str, Array] = field(default_factory=dict)
    lengths: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(
        cls,
        model: ir.Model,
        plan: Plan,
        capacity: int,
        *,
        half: bool = True,
        capabilities: Capabilities = TENSORRT_RTX,
    ) -> TrtDecoder:
        """Lowers and opens a canonical decoder; without `half` in float32 throughout."""
        lowered = lower_decoder(model, plan.context_length, capacity, capabilities).model
        lowered = ir.external_data.load_to_model(lowered)
        return cls(open_as_it_is(lowered if half else in_float32(lowered)), plan, capacity)

    def prefill(self, embeds: Array, prompt: Prompt, keep: int) -> Array:
        """Runs a prompt on an empty cache; returns logits of its last tokens `[B,keep,V]`."""
        rows, longest = prompt.mask.shape
        self.lengths = np.zeros(rows, np.int64)
        dtype = np.float16 if self._is_half() else np.float32
        shape = (rows, self.plan.num_key_value_heads, self.capacity, self.plan.head_dim)
        # What is not written yet must not count, whatever it is.
        self.cache = {name: np.full(shape, 7, dtype) for name in self._names("past_key_values.")}
        lengths = prompt.mask.sum(axis=1)
        types = np.zeros_like(prompt.mask) if prompt.types is None else prompt.types
        turned = [_to_right(array, lengths) for array in (embeds, prompt.positions, prompt.mask, types)]
        wanted = np.maximum(np.arange(longest - keep, longest)[None] - (longest - lengths)[:, None], 0)
        logits = self._run(*turned, wanted)
        self.lengths = lengths
        return logits

    def extend(self, embeds: Array) -> Array:
        """Runs text tokens `[B,S,D]` behind what is in the cache; returns their logits."""
        rows, tokens = embeds.shape[:2]
        positions = self.lengths[:, None] + np.arange(tokens)[None]
        ones, none = np.ones((rows, tokens), np.int64), np.zeros((rows, tokens), np.int64)
        logits = self._run(embeds, positions, ones, none, np.tile(np.arange(tokens), (rows, 1)))
        self.lengths = self.lengths + tokens
        return logits

    def answer(self, table: Array, tokens: Array) -> Iterator[Array]:
        """Gives an answer token by token; yields the logits behind each `[B,V]`."""
        for token in tokens.T:
            yield self.extend(table[token[:, None]])[:, 0]

    def _run(self, embeds: Array, positions: Array, mask: Array, types: Array, wanted: Array) -> Array:
        feeds = {
            "inputs_embeds": embeds.astype(np.float32),
            "position_ids": positions,
            "attention_mask": mask,
            "token_type_ids": types,
            "logit_positions": wanted,
            "write_indices": self.lengths,
            **self.cache,
        }
        names = [value.name for value in self.session.get_outputs()]
        inputs = {value.name for value in self.session.get_inputs()}
        outputs = dict(zip(names, self.session.run(names, {key: feeds[key] for key in inputs}), strict=True))
        self.cache = {name.replace("present.", "past_key_values."): outputs[name] for name in names if name != "logits"}
        return outputs["logits"]

    def _names(self, start: str) -> list[str]:
        return [value.name for value in self.session.get_inputs() if value.name.startswith(start)]

    def _is_half(self) -> bool:
        past = next(value for value in self.session.get_inputs() if value.name.startswith("past_key_values."))
        return bool(past.type == "tensor(float16)")


def _to_right(array: Array, lengths: Array) -> Array:
    """Moves each sequence's padding behind it."""
    turned = np.zeros_like(array)
    for row, length in enumerate(lengths):
        turned[row, :length] = array[row, len(array[row]) - length :]
    return turned
