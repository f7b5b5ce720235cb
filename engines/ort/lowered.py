"""What the engines of ONNX Runtime that run lowered graphs share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qavp_export.engines import TOKEN_TYPES, EngineOptions
from qavp_export.engines.ort.cached import CachedDecoder, CachedSession
from qavp_export.engines.ort.codes import check_codes
from qavp_export.engines.ort.encoders import VISION_OUTPUTS, OrtEncoders, VisionEncoder
from qavp_export.engines.ort.growing import GrowingDecoder, GrowingSession
from qavp_export.engines.ort.plan import PLAN_NAME, SELECTION, EnginePlan
from qavp_export.engines.ort.session import CPU_PROVIDER, Graph, GraphPipeline, input_names
from qavp_export.engines.ort.weights import read_weights
from qavp_export.errors import BundleError, InputError, QavpError, UnavailableError
from qavp_export.manifest import Manifest
from qavp_export.memory import trim_heap

_VISION = ("w8a8", "fp32")
_MEMORY = ("high", "low")


@dataclass(frozen=True)
class Backend:
    """Where lowered graphs run.

    Attributes:
        folder: Their folder inside the bundle.
        providers: Execution providers of ONNX Runtime, best first.
        device: Where the key/value cache lies.
        cache: Type of keys and values.
        caches: Names of the types that the cache can have, that of `cache` first.
        vision: How the vision tower runs beside a quantized decoder, unless the options say otherwise.
        suffix: Graphs whose name ends with it are preferred.
    """

    folder: str
    providers: tuple[str, ...]
    device: str
    cache: type[np.float32] | type[np.float16]
    caches: tuple[str, ...]
    vision: str
    suffix: str = ""


class LoweredEngine(OrtEncoders):
    """Runs a bundle's lowered graphs.

    Sessions are shared by all calls; everything that a generation changes is in its own session.
    """

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions, graphs: LoweredGraphs) -> None:
        """Opens the graphs.

        Raises:
            BundleError: A graph is missing or cannot be opened.
            InputError: An option is out of range.
            UnavailableError: The decoder cannot run with little memory, or with the cache that is asked for.
        """
        _check_options(options, graphs.backend)
        # What needs most memory to open comes first.
        prefill, decode = graphs.bodies()
        super().__init__(bundle, manifest, options, graphs.vision(vision_precision(graphs.backend, manifest, options)))
        self._decoder = graphs.decoder(self, prefill, decode, manifest)

    def start(self, capacity: int = 0) -> CachedSession | GrowingSession:
        """See `Engine.start`."""
        if isinstance(self._decoder, GrowingDecoder):
            return GrowingSession(self._decoder)
        return CachedSession(self._decoder, capacity)


def vision_precision(backend: Backend, manifest: Manifest, options: EngineOptions) -> str:
    """Returns how the vision tower runs: `w8a8` or `fp32`."""
    quantized = any(precision.startswith("w") for precision in manifest.precision.values())
    # Who asks for a float decoder asks for the model as it is.
    return options.vision or (backend.vision if quantized else "fp32")


def _check_options(options: EngineOptions, backend: Backend) -> None:
    if options.vision is not None and options.vision not in _VISION:
        raise InputError(f"vision is {options.vision!r}; choose one of {', '.join(_VISION)}")
    if options.cpu_memory not in _MEMORY:
        raise InputError(f"cpu_memory is {options.cpu_memory!r}; choose one of {', '.join(_MEMORY)}")
    if options.kv_cache is not None and options.kv_cache not in backend.caches:
        choices = ", ".join(backend.caches)
        raise InputError(f"kv_cache is {options.kv_cache!r}; choose one of {choices} with this engine")


@dataclass(frozen=True)
class OpenedBody:
    """An opened decoder without its head.

    Attributes:
        graph: The graph.
        inputs: What it takes.
    """

    graph: Graph
    inputs: frozenset[str]


class LoweredGraphs:
    """Opens the lowered graphs of a bundle.

    Args:
        bundle: The bundle's folder.
        options: How they are opened.
        backend: Where they run.

    Attributes:
        backend: Where they run.

    Raises:
        BundleError: The plan is missing or cannot be read.
    """

    def __init__(self, bundle: Path, options: EngineOptions, backend: Backend) -> None:
        self._bundle = bundle
        self._options = options
        self.backend = backend
        self._folder = bundle / backend.folder
        self._plan = EnginePlan.read(self._folder)

    def vision(self, precision: str) -> VisionEncoder:
        """Opens the vision encoder, and the selection of tokens where that is a graph of its own: on the CPU."""
        encoder = self.open(f"vision_encoder.{precision}", "vision encoder")
        if set(VISION_OUTPUTS) <= set(encoder.outputs):
            return encoder
        return GraphPipeline([encoder, self.open(SELECTION, "selection of tokens", (CPU_PROVIDER,))])

    @property
    def _coded(self) -> bool:
        """Whether keys and values are kept as 8-bit codes."""
        return self._options.kv_cache == "int8"

    def bodies(self) -> tuple[OpenedBody, OpenedBody]:
        """Opens what runs prompts and what runs single tokens; they may be one.

        Raises:
            UnavailableError: Little memory is asked for, and one graph cannot do both; or the cache is to hold codes,
                and the decoder or ONNX Runtime cannot do that.
        """
        low_memory = self._options.cpu_memory == "low"
        if self._coded:
            return self._bodies_of_codes(low_memory=low_memory)
        if low_memory and "decoder" not in self._plan.graphs:
            raise UnavailableError(
                f"the decoder of {self._bundle} cannot run prompts and single tokens in one graph; "
                "leave cpu_memory=low out"
            )
        if low_memory or "prefill" not in self._plan.graphs:
            both = self._body("decoder")
            return both, both
        return self._body("prefill"), self._body("decode")

    def _bodies_of_codes(self, *, low_memory: bool) -> tuple[OpenedBody, OpenedBody]:
        if self._plan.cache == "growing":
            raise UnavailableError(
                f"the decoder of {self._bundle} keeps a cache that is copied as it grows; leave kv_cache=int8 out"
            )
        if low_memory:
            raise UnavailableError(
                "prompts and single tokens need a graph each where keys and values are 8-bit codes; "
                "leave cpu_memory=low or kv_cache=int8 out"
            )
        check_codes(lambda: self.open("probe.int8", "probe of 8-bit codes"))
        return self._body("prefill" if "prefill" in self._plan.graphs else "decoder"), self._body("decode.int8")

    def decoder(
        self, encoders: OrtEncoders, prefill: OpenedBody, decode: OpenedBody, manifest: Manifest
    ) -> CachedDecoder | GrowingDecoder:
        """Opens the head and puts the decoder together."""
        head = self.open("head", "head")
        if self._plan.cache == "growing":
            typed = TOKEN_TYPES in input_names(manifest, "decoder")
            return GrowingDecoder(encoders, prefill.graph, decode.graph, head, manifest.decoder, typed)
        return CachedDecoder(
            encoders,
            prefill.graph,
            decode.graph,
            head,
            prefill.inputs,
            decode.inputs,
            manifest.decoder,
            self.backend.device,
            self.backend.cache,
            self._coded,
        )

    def _body(self, name: str) -> OpenedBody:
        return OpenedBody(self.open(name, "decoder"), frozenset(self._plan.graphs[name].inputs))

    def open(self, name: str, title: str, providers: Sequence[str] = ()) -> Graph:
        """Opens a graph.

        Args:
            name: Its name in the plan.
            title: What messages call it.
            providers: Execution providers, best first; none: those of the backend.

        Raises:
            BundleError: It is missing or cannot be opened.
            QavpError: Memory does not suffice.
        """
        exact = f"{name}{self.backend.suffix}"
        graph = self._plan.graphs.get(exact) or self._plan.graphs.get(name)
        if graph is None:
            raise BundleError(f"{self._folder / PLAN_NAME} has no graph {name!r}; export the bundle again")
        weights = read_weights(self._bundle, graph.weights, self._options.threads or os.cpu_count() or 1)
        path, providers = self._folder / graph.file, providers or self.backend.providers
        try:
            opened = Graph(title, path, self._options, graph.inputs, graph.outputs, weights, providers)
        except MemoryError as error:
            raise QavpError(
                f"not enough memory for the {title} of {self._bundle}; use --cpu-memory low or a machine with more"
            ) from error
        # Weights that ONNX Runtime has packed are freed, but not to the system.
        trim_heap()
        return opened
