"""A generation whose key/value cache is made anew, one token longer, at every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import TOKEN_TYPES, FloatArray, IntArray
from qavp_export.engines.ort.encoders import OrtEmbedding
from qavp_export.engines.ort.session import Graph, Values, value
from qavp_export.engines.sequences import cache_names
from qavp_export.manifest import DecoderSpec


@dataclass(frozen=True)
class GrowingDecoder:
    """A decoder that takes the contract's inputs, in one graph or in two.

    Attributes:
        embedding: Embeds the tokens of the answer.
        prefill: Runs prompts.
        decode: Runs single tokens.
        head: Makes logits of hidden states; None if the graphs return logits.
        spec: The decoder's sizes.
        typed: Whether the decoder takes `token_type_ids`.
    """

    embedding: OrtEmbedding
    prefill: Graph
    decode: Graph
    head: Graph | None
    spec: DecoderSpec
    typed: bool


class GrowingSession:
    """A generation; its cache is held as OrtValues from step to step. See `DecoderSession`."""

    def __init__(self, decoder: GrowingDecoder) -> None:
        """Starts with no cache."""
        self._decoder = decoder
        self._past_names, self._present_names = cache_names(decoder.spec.num_layers)
        self._cache: Values = {}

    def prefill(
        self,
        inputs_embeds: FloatArray,
        attention_mask: IntArray,
        position_ids: IntArray,
        token_type_ids: IntArray | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> FloatArray:
        """See `DecoderSession.prefill`."""
        spec = self._decoder.spec
        shape = (inputs_embeds.shape[0], spec.num_key_value_heads, 0, spec.head_dim)
        self._cache = dict.fromkeys(self._past_names, value(np.zeros(shape, np.float32), np.float32))
        inputs = self._inputs(value(inputs_embeds, np.float32), attention_mask, position_ids, token_type_ids)
        return self._run(self._decoder.prefill, inputs, logits_to_keep)

    def decode(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        """See `DecoderSession.decode`."""
        embeds = self._decoder.embedding.embed_text(input_ids)
        return self._run(self._decoder.decode, self._inputs(embeds, attention_mask, position_ids, None), 0)

    def reorder(self, rows: IntArray) -> None:
        """See `DecoderSession.reorder`."""
        self._cache = {name: value(kept.numpy()[rows], np.float32) for name, kept in self._cache.items()}

    def _inputs(
        self, embeds: ort.OrtValue, attention_mask: IntArray, position_ids: IntArray, token_type_ids: IntArray | None
    ) -> Values:
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": value(attention_mask, np.int64),
            "position_ids": value(position_ids, np.int64),
            **self._cache,
        }
        if self._decoder.typed:
            of_text = np.zeros_like(position_ids)
            inputs[TOKEN_TYPES] = value(of_text if token_type_ids is None else token_type_ids, np.int64)
        return inputs

    def _run(self, graph: Graph, inputs: Values, logits_to_keep: int) -> FloatArray:
        outputs = graph.run(inputs)
        self._cache = {
            past: outputs[present] for past, present in zip(self._past_names, self._present_names, strict=True)
        }
        head = self._decoder.head
        if head is None:
            logits: FloatArray = outputs["logits"].numpy()[:, -logits_to_keep:]
            return logits
        hidden = outputs["hidden_states"]
        if logits_to_keep:
            hidden = value(hidden.numpy()[:, -logits_to_keep:], np.float32)
        of_hidden: FloatArray = head.run({"hidden_states": hidden})["logits"].numpy()
        return of_hidden
