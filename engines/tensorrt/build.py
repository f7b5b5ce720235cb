"""Builds engines for TensorRT and TensorRT-RTX, and says what is in them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qavp_export.engines.tensorrt.inspector import EngineLayer, mismatches, parse_json, parse_log, realized_precision
from qavp_export.engines.tensorrt.keys import (
    ALTERNATING,
    IN_PLACE,
    TENSORRT,
    TENSORRT_RTX,
    TITLES,
    EngineKeys,
    GraphKeys,
    engine_folder,
)
from qavp_export.engines.tensorrt.lowering.capabilities import CACHE_UPDATE, Capabilities, capabilities_of
from qavp_export.engines.tensorrt.lowering.decoder import lower_decoder
from qavp_export.engines.tensorrt.lowering.embedding import lower_embedding
from qavp_export.engines.tensorrt.lowering.network import LoweredNetwork
from qavp_export.engines.tensorrt.lowering.vision import lower_vision
from qavp_export.engines.tensorrt.process import run_worker
from qavp_export.engines.tensorrt.profiles import (
    KEEP_TOKENS,
    Profile,
    decoder_profiles,
    embedding_profiles,
    settle_profiles,
    vision_profiles,
)
from qavp_export.engines.tensorrt.report import check_report, write_report
from qavp_export.engines.tensorrt.targets import EngineTargets, check_formats
from qavp_export.engines.tensorrt.worker import Report, Request
from qavp_export.errors import QavpError
from qavp_export.manifest import Manifest
from qavp_export.runtime.processors import load_processor

# (graph, steps done, steps in all)
Progress = Callable[[str, int, int], None]

_TIMING_CACHE = "timing.cache"
# What the types of a layer with these activations ask for in the place of integers.
_ROUNDED_FLOATS = ("w4a4", "w4a8", "w8a8")


@dataclass(frozen=True)
class Builder:
    """A library that builds engines here.

    Attributes:
        flavour: One of `FLAVOURS`.
        version: Version of the library.
        gpus: Compute capabilities that it builds for.
        network: What a network for it may hold.
    """

    flavour: str
    version: str
    gpus: tuple[int, ...]
    network: Capabilities

    def describe(self) -> dict[str, Any]:
        """Returns what is known of the engines before they are built, as JSON values; keys as in the manifest."""
        return {"version": self.version, "capabilities": list(self.gpus)}


@dataclass(frozen=True)
class CheckedTargets:
    """What is built, and what builds it, as `check_targets` has found it.

    Attributes:
        targets: What is built.
        builders: One for each flavour.
    """

    targets: EngineTargets
    builders: tuple[Builder, ...]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Returns what is known of the engines before they are built, by flavour, as JSON values."""
        return {builder.flavour: builder.describe() for builder in self.builders}


def check_targets(
    targets: EngineTargets, precisions: Collection[str], context_length: int, tokens_kept: int | None
) -> CheckedTargets:
    """Checks that engines can be built here, and that what they hold runs there, before anything else is done.

    Args:
        targets: What is to be built.
        precisions: What the decoder's layers are to run in: `w4a4`, `nvfp4`, ...
        context_length: Most tokens of a sequence.
        tokens_kept: Tokens of a unit that survive (k); None if they vary.

    Returns:
        The targets, with the libraries that were found for them.

    Raises:
        InputError: A setting is out of range.
        UnavailableError: The library or a GPU is not there, or the GPU does not run a format.
    """
    targets.check()
    settle_profiles(targets, context_length, tokens_kept)
    if targets.capability_report:
        check_report()
    builders: list[Builder] = []
    for flavour in targets.flavours:
        builders.append(_find_builder(flavour, targets))
        check_formats(precisions, builders[-1].gpus)
    return CheckedTargets(targets, tuple(builders))


def _find_builder(flavour: str, targets: EngineTargets) -> Builder:
    with tempfile.TemporaryDirectory(prefix="qavp-") as work:
        found = run_worker(Request(flavour, report=""), Path(work))
    gpus = targets.capabilities if found.capability is None else (found.capability,)
    return Builder(flavour, found.version, gpus, capabilities_of(flavour, found.version))


def build_tensorrt_engines(
    bundle: Path, manifest: Manifest, checked: CheckedTargets, work: Path, progress: Progress
) -> dict[str, Any]:
    """Builds engines of a bundle's graphs.

    Args:
        bundle: The bundle's folder, with the canonical graphs and their weights; takes `engines/<flavour>`.
        manifest: The bundle's manifest.
        checked: What is built, as `check_targets` returns it.
        work: A folder for what is needed meanwhile.
        progress: Called as the builders go on.

    Returns:
        What was built, by flavour, as the manifest says it.

    Raises:
        InputError: The largest shapes do not fit the model.
        UnavailableError: The library or a GPU is not there.
        QavpError: A graph was not parsed or built, or a layer runs in another precision than its types say.
    """
    targets = checked.targets
    return {
        builder.flavour: _Flavour(bundle, manifest, targets, work, builder).build(progress)
        for builder in checked.builders
    }


@dataclass(frozen=True)
class _Built:
    """One engine: its keys, and how the builder was reported to have made it."""

    keys: GraphKeys
    report: Report
    fallbacks: list[str]


class _Flavour:
    """Builds the engines of one flavour."""

    def __init__(self, bundle: Path, manifest: Manifest, targets: EngineTargets, work: Path, builder: Builder) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._targets = targets
        self._work = work
        self._flavour = builder.flavour
        self._folder = bundle / engine_folder(builder.flavour)
        self._profiles = settle_profiles(targets, manifest.decoder.context_length, manifest.vision_tokens.after)
        self._gpus = builder.gpus
        self._capabilities = builder.network

    def build(self, progress: Progress) -> dict[str, Any]:
        """Builds all graphs, one at a time, and writes the keys."""
        self._folder.mkdir(parents=True, exist_ok=True)
        built: dict[str, _Built] = {}
        notes = [*self._notes()]
        for name, network, profiles in self._networks():
            notes += network.notes
            stage = f"{self._flavour} {name}"
            progress(stage, 0, 1)
            built[name] = self._build_one(name, network, profiles, partial(progress, stage))
        fallbacks = [line for one in built.values() for line in one.fallbacks]
        if fallbacks and not self._targets.allow_precision_fallback:
            raise QavpError(
                f"{TITLES[self._flavour]} built {len(fallbacks)} layers in another precision than asked for: "
                f"{fallbacks[0]}; choose another recipe, or pass --allow-precision-fallback"
            )
        report = built["decoder"].report
        keys = EngineKeys(
            flavour=self._flavour,
            version=report.version,
            capabilities=self._gpus,
            driver=report.driver,
            profiles=self._profiles,
            cache=IN_PLACE if CACHE_UPDATE in self._capabilities.operators else ALTERNATING,
            graphs={name: one.keys for name, one in built.items()},
            notes=(*notes, *fallbacks),
        )
        keys.write(self._folder)
        return _describe(keys)

    def _networks(self) -> Iterator[tuple[str, LoweredNetwork, list[Profile]]]:
        manifest, capabilities, limits = self._manifest, self._capabilities, self._profiles
        tokens = manifest.vision_tokens
        network = lower_vision(self._load("vision_encoder"), capabilities)
        yield "vision_encoder", network, vision_profiles(network.model, tokens, self._longest_side())
        network = lower_embedding(self._load("embedding"), capabilities)
        yield "embedding", network, embedding_profiles(network.model, limits, tokens)
        context = manifest.decoder.context_length
        network = lower_decoder(self._load("decoder"), context, limits.capacity, capabilities)
        yield "decoder", network, decoder_profiles(network.model, limits, tokens)

    def _longest_side(self) -> int | None:
        """Returns the longest side of an image that keeps its resolution, as the processor's settings say."""
        if self._manifest.vision_tokens.layout != "native":
            return None
        side: int | None = load_processor(self._bundle).image_processor.size.get("longest_edge")
        return side

    def _load(self, component: str) -> ir.Model:
        return ir.load(self._bundle / self._manifest.components[component].file)

    def _build_one(
        self, name: str, network: LoweredNetwork, profiles: list[Profile], progress: Callable[[int, int], None]
    ) -> _Built:
        model, engine = self._work / f"{name}.onnx", self._folder / f"{name}.engine"
        weights = self._work / f"{name}.onnx.data"
        ir.save(network.model, model, external_data=weights.name)
        request = Request(
            flavour=self._flavour,
            report="",
            model=str(model),
            engine=str(engine),
            profiles=tuple({key: [list(bound) for bound in bounds] for key, bounds in one.items()} for one in profiles),
            values=(KEEP_TOKENS,),
            capabilities=self._targets.capabilities if self._flavour == TENSORRT_RTX else (),
            timing_cache=str(self._folder / _TIMING_CACHE) if self._flavour == TENSORRT else None,
            plugins=self._capabilities.plugins,
        )
        try:
            report = run_worker(request, self._work, progress)
        except QavpError as error:
            raise type(error)(f"{self._flavour}, {name.replace('_', ' ')}: {error}") from error
        if self._targets.capability_report:
            write_report(model, self._folder / f"{name}.capability.txt", self._flavour)
        for path in (model, weights):
            path.unlink(missing_ok=True)
        if report.inspector is not None:
            (self._folder / f"{name}.layers.json").write_text(report.inspector, encoding="utf-8")
        realized = realized_precision(_layers(report), network.expected)
        inputs, outputs = (
            tuple(str(value.name) for value in values)
            for values in (network.model.graph.inputs, network.model.graph.outputs)
        )
        keys = GraphKeys.of(engine, inputs, outputs, network.requested, realized)
        return _Built(keys, report, mismatches(network.expected, realized))

    def _notes(self) -> Iterator[str]:
        if self._capabilities.plugins:
            return
        rounded = sorted({value for value in self._manifest.precision.values() if value in _ROUNDED_FLOATS})
        if rounded:
            yield (
                f"{', '.join(rounded)}: weights stay in 4 or 8 bits; activations are rounded as the format says and "
                "then multiplied as float32, since TensorRT-RTX has no product for them"
            )


def _layers(report: Report) -> list[EngineLayer]:
    if report.inspector is None:
        return parse_log(report.layers)
    try:
        return parse_json(report.inspector)
    except ValueError as error:
        raise QavpError(f"TensorRT {report.version}: {error}") from error


def _describe(keys: EngineKeys) -> dict[str, Any]:
    """Returns what the manifest says of a flavour's engines."""
    graphs: Mapping[str, GraphKeys] = {name: graph for name, graph in keys.graphs.items() if graph.realized}
    return {
        "folder": engine_folder(keys.flavour),
        "cache": keys.cache,
        "version": keys.version,
        "capabilities": list(keys.capabilities),
        "profiles": dataclasses.asdict(keys.profiles),
        "precision": {name: dict(Counter(graph.realized.values())) for name, graph in graphs.items()},
        "layers": {
            name: {layer: [graph.requested[layer], realized] for layer, realized in graph.realized.items()}
            for name, graph in graphs.items()
        },
        "notes": list(keys.notes),
    }
