"""A generation on a GPU: keys and values stay there, and a step is one CUDA graph, or two by turns."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import numpy as np

from qavp_export.engines import TOKEN_TYPES, FloatArray, IntArray
from qavp_export.engines.cuda.driver import Buffer, Graph, Stream
from qavp_export.engines.sequences import last_positions, lengths_of, to_right
from qavp_export.engines.tensorrt.decoder import EMBEDS, PREFILL, KeyValueCache, TensorRtDecoder
from qavp_export.engines.tensorrt.execution import Array, ContextPool, Execution
from qavp_export.errors import InputError, QavpError

# What decoders take whose prompts are not causal: 1 for a token, 0 for padding behind it `[B, S]`.
_MASK = "attention_mask"


class Step:
    """The embedding and the decoder for single tokens, on memory that stays where it is.

    Where keys and values change sides with every token, each side has a graph of its own: copying them back would take
    another pass over the whole cache for every token, and addresses in a graph are fixed.
    """

    def __init__(self, decoder: TensorRtDecoder, cache: KeyValueCache, stream: Stream) -> None:
        """Takes contexts and binds them."""
        self._decoder = decoder
        self._cache = cache
        self._stream = stream
        self._embedding = decoder.embedding.contexts.take()
        self._execution = decoder.decode.take()
        self._release = weakref.finalize(
            self, _give_back, (decoder.embedding.contexts, self._embedding), (decoder.decode, self._execution)
        )
        self._captures = decoder.captures
        self._graphs: dict[int, Graph] = {}
        # Sides of the cache that a run was made on, and the one that the context is bound to.
        self._ran: set[int] = set()
        self._bound = cache.side
        rows = cache.shape.rows
        self._ids = np.zeros((rows, 1), np.int64)
        self._places: dict[str, Array] = {
            name: np.zeros(shape, np.int64)
            for name, shape in (("position_ids", (rows, 1)), ("write_indices", (rows,)))
            if name in decoder.network.inputs
        }
        self._output = self._bind(rows)

    def run(self, input_ids: IntArray, position_ids: IntArray, write_indices: IntArray) -> FloatArray:
        """Runs once and waits.

        Args:
            input_ids: `[B, 1]`.
            position_ids: `[B, 1]`.
            write_indices: Tokens of each sequence before this one `[B]`.

        Returns:
            Logits `[B, 1, V]`.
        """
        self._ids[:] = input_ids
        self._embedding.refill("input_ids", self._ids, self._stream)
        values = {"position_ids": position_ids, "write_indices": write_indices}
        for name, array in self._places.items():
            array[:] = values[name]
            self._execution.refill(name, array, self._stream)
        self._launch()
        buffer, shape = self._output
        logits = np.empty(shape, self._decoder.network.dtype("logits"))
        buffer.download(logits, self._stream)
        self._stream.synchronize()
        return logits.astype(np.float32, copy=False)

    def release(self) -> None:
        """Gives the contexts back; nothing may be run after."""
        self._graphs.clear()
        self._release()

    def _bind(self, rows: int) -> tuple[Buffer, tuple[int, ...]]:
        decoder, stream, execution = self._decoder, self._stream, self._execution
        network, embedding = decoder.network, decoder.embedding.network
        least, _ = embedding.limits("image_features", 0)
        no_images = np.zeros(no_features(least, decoder.spec.hidden_size), embedding.dtype("image_features"))
        self._embedding.feed({"input_ids": self._ids, "image_features": no_images}, stream)
        embeds, shape = self._embedding.make_output(EMBEDS)
        of_text = np.zeros((rows, 1), np.int64)
        inputs = {**self._places, "logit_positions": of_text, TOKEN_TYPES: of_text, _MASK: np.ones_like(of_text)}
        execution.bind(EMBEDS, shape, embeds.address)
        execution.feed({name: array for name, array in inputs.items() if name in network.inputs}, stream)
        self._cache.bind(execution)
        return execution.make_output("logits")

    def _launch(self) -> None:
        side = self._cache.side
        # The first run initializes what must not be initialized in a capture.
        if self._captures and side in self._ran and side not in self._graphs:
            self._capture(side)
        if side in self._graphs:
            self._graphs[side].launch(self._stream)
        else:
            self._enqueue(side)
            self._ran.add(side)
        self._cache.turn()

    def _capture(self, side: int) -> None:
        try:
            with self._stream.capture() as capture:
                self._enqueue(side)
        except QavpError as error:
            warnings.warn(f"single tokens run without a CUDA graph: {error}", RuntimeWarning, stacklevel=2)
            self._captures = False
            return
        if capture.graph is not None:
            self._graphs[side] = capture.graph

    def _enqueue(self, side: int) -> None:
        if side != self._bound:
            self._cache.bind(self._execution)
            self._bound = side
        self._embedding.enqueue(self._stream)
        self._execution.enqueue(self._stream)


class TensorRtSession:
    """A generation. Prompts come padded on the left and are kept padded on the right. See `DecoderSession`."""

    def __init__(self, decoder: TensorRtDecoder, capacity: int) -> None:
        """Starts with an empty cache; `capacity` is the number of tokens that memory is set aside for."""
        self._decoder = decoder
        self._wanted = capacity
        self._stream = decoder.device.stream()
        self._cache: KeyValueCache | None = None
        self._filled = 0
        self._step: Step | None = None

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
            InputError: A sequence has padding elsewhere than in front of it, or the engine was built for less.
        """
        decoder, stream = self._decoder, self._stream
        decoder.device.make_current()
        lengths = lengths_of(attention_mask)
        rows, longest = attention_mask.shape
        decoder.check_prompt(longest)
        shape = decoder.room(rows, longest, self._wanted)
        self._forget_step()
        self._cache = cache = KeyValueCache(decoder, shape, stream)
        types = np.zeros_like(attention_mask) if token_type_ids is None else token_type_ids
        values: dict[str, Array] = {
            EMBEDS: to_right(inputs_embeds, lengths),
            "position_ids": to_right(position_ids, lengths),
            "write_indices": np.zeros(rows, np.int64),
            "logit_positions": last_positions(lengths, longest, logits_to_keep),
            TOKEN_TYPES: to_right(types, lengths),
            _MASK: to_right(attention_mask, lengths),
        }
        network = decoder.network
        inputs = {
            name: np.asarray(values[name], network.dtype(name), order="C") for name in values if name in network.inputs
        }
        network.check({name: array.shape for name, array in inputs.items()}, PREFILL)
        with decoder.prefill.borrow() as execution:
            cache.bind(execution)
            logits = execution.run(inputs, ["logits"], stream)["logits"]
            stream.synchronize()
        cache.turn()
        self._filled = longest
        return logits.astype(np.float32, copy=False)

    def decode(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        """See `DecoderSession.decode`.

        Raises:
            InputError: The engine was built for shorter sequences, or no prompt was run.
        """
        cache = self._prompted()
        lengths = attention_mask.sum(axis=1)
        longest = int(lengths.max())
        if longest > cache.shape.capacity:
            cache = self._replace(np.arange(cache.shape.rows), longest, 2 * cache.shape.capacity)
        if self._step is None:
            self._step = Step(self._decoder, cache, self._stream)
        logits = self._step.run(input_ids, position_ids, lengths - 1)
        self._filled = longest
        return logits

    def reorder(self, rows: IntArray) -> None:
        """See `DecoderSession.reorder`.

        Raises:
            InputError: The engine was built for fewer sequences, or no prompt was run.
        """
        cache = self._prompted()
        if len(rows) == cache.shape.rows:
            # A captured step goes on.
            cache.permute(rows, self._filled, self._stream)
        else:
            self._replace(rows, self._filled, cache.shape.capacity)

    def _prompted(self) -> KeyValueCache:
        self._decoder.device.make_current()
        if self._cache is None:
            raise InputError("there is no prompt to go on from; call prefill first")
        return self._cache

    def _replace(self, rows: IntArray, tokens: int, wanted: int) -> KeyValueCache:
        """Goes on with a cache of another shape; a step is bound, and captured, anew."""
        old = self._prompted()
        shape = self._decoder.room(len(rows), tokens, wanted)
        self._forget_step()
        self._cache = old.take(rows, shape, self._filled, self._stream)
        # The old one is freed on return.
        self._stream.synchronize()
        return self._cache

    def _forget_step(self) -> None:
        if self._step is not None:
            self._step.release()
            self._step = None


def no_features(least: Sequence[int], width: int) -> tuple[int, ...]:
    """Returns the shape of the image features of a text: the fewest that the embedding was built for.

    Args:
        least: The least shape of its profile.
        width: Channels of a feature.
    """
    return (*least[:2], width)


def _give_back(*taken: tuple[ContextPool, Execution]) -> None:
    for pool, execution in taken:
        pool.give(execution)
