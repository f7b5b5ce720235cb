"""Engines: what runs a bundle's graphs, one module for each backend, behind one small protocol.

Importing this package imports no backend: `load_engine` imports the one that is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qavp_export.errors import UnavailableError
from qavp_export.manifest import Manifest

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

# What some decoders take beyond the contract `[B, S]`: 1 for image tokens, 0 for others.
TOKEN_TYPES = "token_type_ids"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine opens a bundle.

    Attributes:
        threads: Threads inside one operator; None leaves the choice to the backend.
        graph_optimization: What the backend may rewrite on load: `disable`, `basic`, `extended` or `all`.
        vision: How the vision tower runs: `w8a8` or `fp32`; None leaves the choice to the engine.
        cpu_memory: `high` keeps weights expanded for prompts and packed for single tokens; `low` keeps them packed
            only, at lower speed.
        kv_cache: Type of keys and values in the cache: `float32`, `float16` or `int8`; None leaves the choice to the
            engine.
        spinning: Whether threads wait for work by spinning.
        memory_arena: Whether memory for activations is kept from call to call.
    """

    threads: int | None = None
    graph_optimization: str = "all"
    vision: str | None = None
    cpu_memory: str = "high"
    kv_cache: str | None = None
    spinning: bool = True
    memory_arena: bool = True


class DecoderSession(Protocol):
    """One running generation: the decoder and the key/value cache of its batch."""

    def prefill(
        self,
        inputs_embeds: FloatArray,
        attention_mask: IntArray,
        position_ids: IntArray,
        token_type_ids: IntArray | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> FloatArray:
        """Runs the prompts and fills the cache.

        Args:
            inputs_embeds: Embedded prompts, left padded `[B, S, D]`.
            attention_mask: 1 for a token, 0 for padding `[B, S]`.
            position_ids: Position of each token `[B, S]`.
            token_type_ids: 1 for a vision token, 0 for others `[B, S]`; None: no vision tokens. Only decoders that
                list it as an input read it.
            logits_to_keep: How many last positions are wanted; 0: all.

        Returns:
            Logits `[B, S', V]` of the last S' positions.
        """

    def decode(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        """Appends one text token to every sequence.

        Args:
            input_ids: The tokens `[B, 1]`; none of them an image placeholder.
            attention_mask: 1 for a token, 0 for padding, cache included `[B, past + 1]`.
            position_ids: Position of each token `[B, 1]`.

        Returns:
            Logits `[B, 1, V]`.
        """

    def reorder(self, rows: IntArray) -> None:
        """Takes the sequences anew from the cache, as beam search does: row i goes on from what was row `rows[i]`.

        Args:
            rows: Rows of the cache `[B']`; one may come several times or not at all.
        """


class Encoders(Protocol):
    """What comes before the decoder, opened by one backend. Serves calls from several threads at once."""

    def encode_images(self, inputs: Mapping[str, FloatArray | IntArray]) -> tuple[FloatArray, IntArray]:
        """Runs the vision encoder.

        Args:
            inputs: The graph's inputs by name, `pixel_values [I, 3, H, W]` among them.

        Returns:
            The surviving tokens of each unit `[U, k, D]` and their places among its N tokens `[U, k]`, ascending.
        """

    def embed(self, input_ids: IntArray, image_features: FloatArray) -> FloatArray:
        """Embeds `[B, S]` ids and puts the images' tokens at their placeholders.

        Args:
            input_ids: Token ids with a placeholder for each surviving vision token.
            image_features: These tokens in the order of their placeholders: of U units `[U, k, D]`, or all in one row.

        Returns:
            Embeddings `[B, S, D]`.

        Raises:
            PromptError: The number of placeholders is not that of the features; the message states both.
        """


@runtime_checkable
class Engine(Encoders, Protocol):
    """A bundle opened by one backend. Serves calls from several threads at once."""

    def start(self, capacity: int = 0) -> DecoderSession:
        """Starts a generation with an empty cache.

        Args:
            capacity: Tokens of prompt and answer that memory is set aside for; more are possible, for a copy.
        """


class EngineFactory(Protocol):
    """What an engine's class is called with."""

    def __call__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> Engine:
        """Opens the bundle; raises BundleError if its graphs cannot be opened."""


@dataclass(frozen=True)
class EngineEntry:
    """Where an engine lives and what it needs.

    Attributes:
        module: Module that holds the class.
        attribute: Name of the class.
        requires: Module that must be importable.
        install: Distribution that provides it.
    """

    module: str
    attribute: str
    requires: str
    install: str


ENGINES: Mapping[str, EngineEntry] = MappingProxyType(
    {
        "ort-cpu": EngineEntry(
            module="qavp_export.engines.ort.cpu",
            attribute="OrtCpuEngine",
            requires="onnxruntime",
            install="onnxruntime-gpu (onnxruntime on macOS)",
        ),
        "ort-cuda": EngineEntry(
            module="qavp_export.engines.ort.cuda",
            attribute="OrtCudaEngine",
            requires="onnxruntime",
            install="onnxruntime-gpu",
        ),
        "ort-reference": EngineEntry(
            module="qavp_export.engines.ort.reference",
            attribute="OrtReferenceEngine",
            requires="onnxruntime",
            install="onnxruntime-gpu (onnxruntime on macOS)",
        ),
        "tensorrt": EngineEntry(
            module="qavp_export.engines.tensorrt.runtime",
            attribute="TensorRtEngine",
            requires="tensorrt",
            install="tensorrt-cu13 and cuda-python",
        ),
        "tensorrt-rtx": EngineEntry(
            module="qavp_export.engines.tensorrt.runtime",
            attribute="TensorRtRtxEngine",
            requires="tensorrt_rtx",
            install="tensorrt-rtx-cu13 and cuda-python",
        ),
    }
)


def available_engines() -> list[str]:
    """Returns the names of the engines whose backend is installed."""
    return [name for name, entry in ENGINES.items() if importlib.util.find_spec(entry.requires) is not None]


def load_engine(name: str, bundle: Path, manifest: Manifest, options: EngineOptions) -> Engine:
    """Opens a bundle with the named engine.

    Raises:
        UnavailableError: The engine is unknown or its backend is not installed.
        BundleError: The bundle's graphs are missing or cannot be opened.
    """
    entry = ENGINES.get(name)
    if entry is None:
        raise UnavailableError(
            f"engine {name!r} does not exist; available here: {', '.join(available_engines()) or 'none'}"
        )
    try:
        module = importlib.import_module(entry.module)
    except ImportError as error:
        raise UnavailableError(f"engine {name!r} cannot be imported ({error}); install {entry.install}") from error
    factory = cast(EngineFactory, getattr(module, entry.attribute))
    return factory(bundle, manifest, options)
