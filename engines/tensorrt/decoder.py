"""A decoder in one engine, shared by all generations, and the keys and values of one of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qavp_export.engines import IntArray
from qavp_export.engines.cuda.driver import Buffer, Device, Stream
from qavp_export.engines.sequences import cache_names, whole_steps
from qavp_export.engines.tensorrt.execution import ContextPool, Execution, Network, Stage
from qavp_export.errors import BundleError, InputError
from qavp_export.manifest import DecoderSpec

# Optimization profiles.
PREFILL, DECODE = 0, 1
EMBEDS = "inputs_embeds"


@dataclass(frozen=True)
class Shape:
    """What a cache has room for.

    Attributes:
        rows: Sequences.
        heads: Heads of each key and value.
        capacity: Tokens of each sequence.
        channels: Channels of each head.
    """

    rows: int
    heads: int
    capacity: int
    channels: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Returns the shape of each tensor."""
        return self.rows, self.heads, self.capacity, self.channels


class TensorRtDecoder:
    """A decoder in one engine with two profiles, and the embedding before it. Shared by all generations.

    Attributes:
        device: Where it runs.
        network: The decoder.
        embedding: The embedding.
        spec: The decoder's sizes.
        captures: Whether steps are captured as CUDA graphs here; TensorRT-RTX does it by itself.
        prefill: Contexts for prompts.
        decode: Contexts for single tokens.
        pairs: Names of the inputs and outputs that hold keys and values.
        in_place: Whether outputs that hold keys and values are the memory of the inputs.
        largest: The largest cache that the engine was built for.
    """

    def __init__(
        self, device: Device, network: Network, embedding: Stage, spec: DecoderSpec, *, captures: bool
    ) -> None:
        """Puts the decoder together.

        Raises:
            BundleError: The decoder does not take what the embedding returns.
        """
        self.device = device
        self.network = network
        self.embedding = embedding
        self.spec = spec
        self.captures = captures
        self.prefill = ContextPool(lambda: network.execution(PREFILL, graphs=False))
        self.decode = ContextPool(lambda: network.execution(DECODE, graphs=True))
        self.pairs = list(zip(*cache_names(spec.num_layers), strict=True))
        self.in_place = all(network.updates_in_place(past, present) for past, present in self.pairs)
        self._least, most = network.limits(self.pairs[0][0], PREFILL)
        self.largest = Shape(*most)
        if network.dtype(EMBEDS) != embedding.network.dtype(EMBEDS):
            raise BundleError(
                f"the engines of the {network.name} and the embedding do not fit; export the bundle again"
            )
        self._longest_prompt = network.limits(EMBEDS, PREFILL)[1][1]

    def check_prompt(self, tokens: int) -> None:
        """Checks the length of a batch of prompts.

        Raises:
            InputError: The engine was built for shorter ones.
        """
        if tokens > self._longest_prompt:
            raise InputError(
                f"the prompt has {tokens} tokens and the {self.network.name} was built for {self._longest_prompt}; "
                "shorten it, or export the bundle with a larger --max-tokens"
            )

    def room(self, rows: int, tokens: int, wanted: int) -> Shape:
        """Returns the cache for a number of sequences.

        Args:
            rows: Sequences.
            tokens: Tokens that each must have room for.
            wanted: Tokens that each should have room for.

        Raises:
            InputError: The engine was built for less.
        """
        most = self.largest
        if rows > most.rows:
            raise InputError(
                f"there are {rows} sequences and the {self.network.name} was built for {most.rows} at once; "
                "give fewer, or export the bundle with a larger --max-batch"
            )
        if tokens > most.capacity:
            raise InputError(
                f"prompt and answer have {tokens} tokens and the {self.network.name} was built for {most.capacity}; "
                "shorten the prompt or the answer, or export the bundle with a larger --max-tokens"
            )
        capacity = max(min(whole_steps(max(tokens, wanted)), most.capacity), self._least[2])
        return Shape(rows, most.heads, capacity, most.channels)


class KeyValueCache:
    """Keys and values of a batch on the device.

    Attributes:
        shape: What there is room for.
        side: Which of its memory the next run reads: 0, or 1 where what is written is other memory.
    """

    def __init__(self, decoder: TensorRtDecoder, shape: Shape, stream: Stream) -> None:
        """Allocates them, filled with zeros: what is not a token yet is multiplied by zero.

        Without a cache update there are two of each, in turns read and written.
        """
        self.shape = shape
        self._decoder = decoder
        self._item = decoder.network.dtype(decoder.pairs[0][0]).itemsize
        self._nbytes = int(np.prod(shape.sizes)) * self._item
        self.side = 0
        self._sides = [[self._alloc() for _ in decoder.pairs] for _ in range(1 if decoder.in_place else 2)]
        # All of the other side is written before it is read.
        for tensor in self._sides[0]:
            tensor.zero(stream)

    def bind(self, execution: Execution) -> None:
        """Binds a context to them, for runs on this side."""
        written_to = self._sides[self._other]
        for (past, present), read, written in zip(self._decoder.pairs, self._tensors, written_to, strict=True):
            execution.bind(past, self.shape.sizes, read.address)
            execution.bind_output(present, written.address)

    def turn(self) -> None:
        """Makes what a run wrote what the next one reads."""
        self.side = self._other

    def take(self, rows: IntArray, shape: Shape, filled: int, stream: Stream) -> KeyValueCache:
        """Returns a cache of another shape; its sequence i is the sequence `rows[i]` of this one.

        Args:
            rows: Which sequences `[B']`.
            shape: The shape of the new cache.
            filled: Tokens of the longest sequence.
            stream: Where it is copied.
        """
        taken = KeyValueCache(self._decoder, shape, stream)
        for target, source in zip(taken._tensors, self._tensors, strict=True):
            for row, old in enumerate(rows.tolist()):
                self._copy(target, shape, source, self.shape, filled, stream, (row, old))
        return taken

    def permute(self, rows: IntArray, filled: int, stream: Stream) -> None:
        """Does in place what `take` does, for as many sequences as there are; addresses stay."""
        moved = [(row, old) for row, old in enumerate(rows.tolist()) if row != old]
        if not moved:
            return
        spare = self._alloc()
        for tensor in self._tensors:
            for old in sorted({old for _, old in moved}):
                self._copy(spare, self.shape, tensor, self.shape, filled, stream, (old, old))
            for row, old in moved:
                self._copy(tensor, self.shape, spare, self.shape, filled, stream, (row, old))
        # Freed on return.
        stream.synchronize()

    @property
    def _tensors(self) -> list[Buffer]:
        return self._sides[self.side]

    @property
    def _other(self) -> int:
        return len(self._sides) - 1 - self.side

    def _alloc(self) -> Buffer:
        return self._decoder.device.alloc(self._nbytes)

    def _copy(
        self,
        target: Buffer,
        target_shape: Shape,
        source: Buffer,
        source_shape: Shape,
        filled: int,
        stream: Stream,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Copies the first tokens of one sequence (of which target row, source row), or of all."""
        token = target_shape.channels * self._item
        pitches = target_shape.capacity * token, source_shape.capacity * token
        first_target, first_source = rows or (0, 0)
        heads = target_shape.heads
        target.copy_rows(
            source,
            stream,
            width=filled * token,
            height=heads if rows else heads * target_shape.rows,
            pitches=pitches,
            offsets=(first_target * heads * pitches[0], first_source * heads * pitches[1]),
        )
