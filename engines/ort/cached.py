"""A generation whose key/value cache has its memory from the start: a step writes one token into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from qavp_export.engines import TOKEN_TYPES, FloatArray, IntArray
from qavp_export.engines.ort.codes import encode
from qavp_export.engines.ort.encoders import OrtEmbedding
from qavp_export.engines.ort.plan import LEAST_PROMPT
from qavp_export.engines.ort.session import Graph
from qavp_export.engines.sequences import (
    cache_names,
    last_positions,
    lengths_of,
    scale_names,
    to_right,
    whole_steps,
)
from qavp_export.manifest import DecoderSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class CachedDecoder:
    """A decoder in one lowered graph or in two, and its head.

    Attributes:
        embedding: Embeds the tokens of the answer.
        prefill: Runs prompts.
        decode: Runs single tokens.
        head: Makes logits of hidden states.
        prefill_inputs: What `prefill` takes.
        decode_inputs: What `decode` takes.
        spec: The decoder's sizes.
        device: Where keys and values lie: `cpu` or `cuda`.
        dtype: Type of keys and values.
        coded: Whether `decode` takes the keys and values that `prefill` leaves as 8-bit codes, with their scales.
    """

    embedding: OrtEmbedding
    prefill: Graph
    decode: Graph
    head: Graph
    prefill_inputs: frozenset[str]
    decode_inputs: frozenset[str]
    spec: DecoderSpec
    device: str = "cpu"
    dtype: type[np.float32] | type[np.float16] = np.float32
    coded: bool = False

    def on_device(self, array: Array) -> ort.OrtValue:
        """Returns an array where keys and values lie; on the CPU, as it is."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)


class CachedSession:
    """A generation. Prompts come padded on the left and are kept padded on the right. See `DecoderSession`."""

    def __init__(self, decoder: CachedDecoder, capacity: int) -> None:
        """Starts with an empty cache; `capacity` is the number of tokens that memory is set aside for."""
        self._decoder = decoder
        self._wanted = capacity
        self._past_names, self._present_names = cache_names(decoder.spec.num_layers)
        self._cache: list[ort.OrtValue] = []
        # Of 8-bit codes only: `[B,1,KV*d]` for each tensor of the cache.
        self._scales: list[ort.OrtValue] = []
        self._capacity = 0
        self._step: _Step | None = None

    def prefill(
        self,
        inputs_embeds: FloatArray,
        attention_mask: IntArray,
        position_ids: IntArray,
        token_type_ids: IntArray | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> FloatArray:
        """See `DecoderSession.prefill`.

        Raises:
            InputError: A sequence has padding elsewhere than in front of it.
        """
        lengths = lengths_of(attention_mask)
        rows, longest = attention_mask.shape
        columns = max(longest, LEAST_PROMPT)
        # Codes get their own memory; until then there is only a prompt.
        self._allocate(rows, columns if self._decoder.coded else max(columns, self._wanted))
        inputs: dict[str, Array] = {
            "inputs_embeds": to_right(inputs_embeds.astype(np.float32, copy=False), lengths, columns),
            "position_ids": to_right(position_ids.astype(np.int64, copy=False), lengths, columns),
            "attention_mask": to_right(attention_mask.astype(np.int64, copy=False), lengths, columns),
            TOKEN_TYPES: np.zeros((rows, columns), np.int64),
            "logit_positions": last_positions(lengths, longest, logits_to_keep),
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(columns, np.int32),
        }
        if token_type_ids is not None:
            inputs[TOKEN_TYPES] = to_right(token_type_ids.astype(np.int64, copy=False), lengths, columns)
        logits = self._run_prompts(inputs)
        if self._decoder.coded:
            self._encode(lengths)
        return logits

    def decode(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        """See `DecoderSession.decode`."""
        lengths = attention_mask.sum(axis=1)
        longest = int(lengths.max())
        if longest > self._capacity:
            self._grow(longest)
        if self._step is None:
            decoder = self._decoder
            binding = self._bind(decoder.decode)
            # Without codes there are no scales.
            for name, scales in zip(scale_names(self._past_names), self._scales, strict=False):
                binding.bind_ortvalue_input(name, scales)
            self._step = _Step.of(binding, len(lengths), decoder.decode_inputs, decoder.device)
        step = self._step
        step.set(position_ids, lengths - 1, longest)
        step.binding.bind_ortvalue_input("inputs_embeds", self._decoder.embedding.embed_text(input_ids))
        self._decoder.decode.run_bound(step.binding)
        return self._logits(step.binding)

    def reorder(self, rows: IntArray) -> None:
        """See `DecoderSession.reorder`."""
        self._cache = [self._decoder.on_device(tensor.numpy()[rows]) for tensor in self._cache]
        self._scales = [self._decoder.on_device(scales.numpy()[rows]) for scales in self._scales]
        self._step = None

    def _run_prompts(self, inputs: Mapping[str, Array]) -> FloatArray:
        binding = self._bind(self._decoder.prefill)
        # Kept alive here: ONNX Runtime does not promise that a binding does it.
        bound = {name: np.asarray(inputs[name], order="C") for name in self._decoder.prefill_inputs & inputs.keys()}
        for name, array in bound.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._decoder.prefill.run_bound(binding)
        return self._logits(binding)

    def _encode(self, lengths: IntArray) -> None:
        """Turns the cache of prompts into codes, a tensor after the other: the memory of each is free for the next."""
        self._capacity = whole_steps(max(int(lengths.max()), self._wanted))
        self._scales = []
        for index, tensor in enumerate(self._cache):
            codes, scales = encode(tensor.numpy(), lengths, self._capacity)
            self._cache[index] = self._decoder.on_device(codes)
            self._scales.append(self._decoder.on_device(scales))

    def _logits(self, binding: ort.IOBinding) -> FloatArray:
        # The first output that is bound.
        hidden = binding.get_outputs()[0]
        logits: FloatArray = self._decoder.head.run({"hidden_states": hidden})["logits"].numpy()
        return logits

    def _bind(self, graph: Graph) -> ort.IOBinding:
        """Binds the cache to inputs and outputs alike, so that a run writes into what it reads."""
        binding = graph.bind()
        binding.bind_output("hidden_states", self._decoder.device)
        for past, present, tensor in zip(self._past_names, self._present_names, self._cache, strict=True):
            binding.bind_ortvalue_input(past, tensor)
            binding.bind_ortvalue_output(present, tensor)
        return binding

    def _allocate(self, rows: int, tokens: int) -> None:
        spec = self._decoder.spec
        self._capacity = whole_steps(tokens)
        shape = (rows, spec.num_key_value_heads, self._capacity, spec.head_dim)
        # Zeros, since what is not filled yet is multiplied by zero; the system gives the memory when it is written.
        self._cache = [self._decoder.on_device(np.zeros(shape, self._decoder.dtype)) for _ in self._past_names]
        self._step = None

    def _grow(self, tokens: int) -> None:
        filled = self._capacity
        self._capacity = whole_steps(max(tokens, 2 * filled))
        behind = ((0, 0), (0, 0), (0, self._capacity - filled), (0, 0))
        self._cache = [self._decoder.on_device(np.pad(tensor.numpy(), behind)) for tensor in self._cache]
        self._step = None


@dataclass(frozen=True)
class _Step:
    """What a run for single tokens is bound to; the arrays are written in place.

    Attributes:
        binding: The binding.
        arrays: The inputs that change, by name; ONNX Runtime does not promise that a binding keeps them alive.
        copied: Whether an input is copied to the device when it is bound, so that what is written later stays unseen.
    """

    binding: ort.IOBinding
    arrays: Mapping[str, Array]
    copied: bool

    @classmethod
    def of(cls, binding: ort.IOBinding, rows: int, inputs: frozenset[str], device: str) -> _Step:
        arrays: dict[str, Array] = {
            "position_ids": np.zeros((rows, 1), np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logit_positions": np.zeros((rows, 1), np.int64),
            TOKEN_TYPES: np.zeros((rows, 1), np.int64),
        }
        step = cls(binding, {name: arrays[name] for name in inputs & arrays.keys()}, copied=device != "cpu")
        step._bind()
        return step

    def set(self, positions: IntArray, seqlens: IntArray, total: int) -> None:
        for name, value in (("position_ids", positions), ("seqlens_k", seqlens), ("total_sequence_length", total)):
            if name in self.arrays:
                self.arrays[name][...] = value
        if self.copied:
            self._bind()

    def _bind(self) -> None:
        for name, array in self.arrays.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
