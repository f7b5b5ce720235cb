"""The key/value cache as transformers' generation sees it: the engine holds it, transformers asks to reorder it."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Cache

from qavp_export.engines import DecoderSession, FloatArray, IntArray
from qavp_export.errors import InputError
from qavp_export.runtime import Prepared


class EngineCache(Cache):
    """One generation of a batch: the engine's session, and the mask and positions of what is in its cache.

    The prompts come prepared, with pruned placeholders, whatever ids transformers passes for them; so the length that
    transformers sees is that of its own sequences.
    """

    def __init__(self, session: DecoderSession, prepared: Prepared, context_length: int) -> None:
        """Starts with an empty cache.

        Args:
            session: A session of the engine.
            prepared: The prompts.
            context_length: Positions from here on are never given to the decoder.
        """
        super().__init__(layers=[])
        self._session = session
        self._prepared: Prepared | None = prepared
        self._mask = prepared.attention_mask
        self._positions = prepared.next_positions
        self._context_length = context_length
        self._length = 0

    @property
    def is_filled(self) -> bool:
        """Whether the prompts have been run."""
        return self._prepared is None

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Returns the number of tokens that transformers has passed for each sequence."""
        return self._length

    def prefill(self, input_ids: torch.Tensor, logits_to_keep: int) -> FloatArray:
        """Runs the prompts, each once, and repeats what they give for the sequences that start with them.

        Args:
            input_ids: The prompts as transformers knows them `[B * R, S]`, each of them R times in a row.
            logits_to_keep: Number of last positions to return; 0 for all.

        Returns:
            Logits `[B * R, S', V]`, where S' is the length after pruning.
        """
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            raise InputError("the prompts have been run; start a new generation with generate()")
        logits = self._session.prefill(
            prepared.inputs_embeds,
            prepared.attention_mask,
            prepared.position_ids,
            prepared.token_type_ids,
            logits_to_keep=min(logits_to_keep, prepared.attention_mask.shape[1]),
        )
        self._length = input_ids.shape[1]
        repeats = len(input_ids) // len(logits)
        if repeats == 1:
            return logits
        rows = np.repeat(np.arange(len(logits)), repeats)
        self._reorder(rows)
        repeated: FloatArray = logits[rows]
        return repeated

    def decode(self, input_ids: torch.Tensor) -> FloatArray:
        """Appends one token to every sequence.

        Args:
            input_ids: The tokens `[B, 1]`.

        Returns:
            Logits `[B, 1, V]`.

        Raises:
            InputError: There is not one token for each sequence.
        """
        if input_ids.shape[1] != 1:
            raise InputError(
                f"the engine's cache takes one token at a time, not {input_ids.shape[1]}; leave prefill_chunk_size and "
                "past_key_values out, and pass whole conversations"
            )
        self._mask = np.concatenate([self._mask, np.ones((len(self._mask), 1), np.int64)], axis=1)
        # A sequence that has ended is padded on beside the others, at most to the last position there is.
        positions = np.minimum(self._positions, self._context_length - 1)
        logits = self._session.decode(input_ids.numpy(force=True), self._mask, positions[:, np.newaxis])
        self._positions = self._positions + 1
        self._length += 1
        return logits

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Lets sequence i go on from what was sequence `beam_idx[i]`."""
        self._reorder(beam_idx.numpy(force=True).astype(np.int64))

    def _reorder(self, rows: IntArray) -> None:
        self._session.reorder(rows)
        self._mask = self._mask[rows]
        self._positions = self._positions[rows]
