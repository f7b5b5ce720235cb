"""What the exporter built for TensorRT or TensorRT-RTX, and whether it may be loaded here.

Standard library only: the exporter writes it and the runtime reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from qavp_export.errors import BundleError, UnavailableError

KEYS_NAME = "engine.json"
TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"
# What messages call them.
TITLES: Mapping[str, str] = MappingProxyType({TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT-RTX"})
# Where keys and values are written: into the memory that they are read from, by TensorRT's own cache update, or into
# other memory of the same size, which the next step reads.
IN_PLACE, ALTERNATING = "preallocated", "preallocated, alternating"
# What TensorRT-RTX builds for, with no GPU.
RTX_CAPABILITIES = (80, 86, 89, 120, 121)


def engine_folder(flavour: str) -> str:
    """Returns where a bundle keeps the engines of a flavour."""
    return f"engines/{flavour}"


@dataclass(frozen=True)
class GraphKeys:
    """One serialized engine.

    Attributes:
        file: Its file, beside the keys.
        sha256: Its SHA-256 in hex.
        bytes: Its size.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        requested: The precision that was asked for, by layer.
        realized: The precision that the builder chose, by layer.
    """

    file: str
    sha256: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    requested: Mapping[str, str] = field(default_factory=dict)
    realized: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: Path,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        requested: Mapping[str, str],
        realized: Mapping[str, str],
    ) -> GraphKeys:
        """Describes a file that lies beside the keys."""
        size, digest = path.stat().st_size, _sha256(path)
        return cls(path.name, digest, size, inputs, outputs, dict(requested), dict(realized))


@dataclass(frozen=True)
class Profiles:
    """The largest shapes that the decoder was built for.

    Attributes:
        max_prompt: Tokens of a prompt.
        capacity: Tokens of a prompt and its answer together.
        max_batch: Sequences at once.
    """

    max_prompt: int
    capacity: int
    max_batch: int


@dataclass(frozen=True)
class EngineKeys:
    """What was built, and what has to match where it is loaded.

    Attributes:
        flavour: `tensorrt` or `tensorrt-rtx`.
        version: Version of the library that built it, in full.
        capabilities: Compute capabilities that it was built for, such as 89.
        driver: CUDA version of the driver that the build saw, such as 13000; None if it was built with no GPU.
        profiles: Largest shapes.
        cache: Where the decoder writes keys and values: `IN_PLACE` or `ALTERNATING`.
        graphs: The engines by name.
        notes: What could not be built as asked, a line each.
    """

    flavour: str
    version: str
    capabilities: tuple[int, ...]
    driver: int | None
    profiles: Profiles
    cache: str
    graphs: Mapping[str, GraphKeys]
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the keys beside the engines."""
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)
        (folder / KEYS_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, bundle: Path, flavour: str) -> EngineKeys:
        """Reads the keys of a bundle's engines.

        Raises:
            UnavailableError: The bundle has no such engines.
            BundleError: The keys cannot be read, or name files outside the bundle.
        """
        path = bundle / engine_folder(flavour) / KEYS_NAME
        try:
            keys = cls._of(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UnavailableError(
                f"bundle {bundle} has no engine for {flavour}; export it with {rebuild_options(flavour)}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} cannot be read ({error!r}); export the bundle again") from error
        if keys.flavour != flavour:
            raise BundleError(f"{path} is of an engine for {keys.flavour!r}; export the bundle again")
        for graph in keys.graphs.values():
            if PurePosixPath(graph.file).is_absolute() or ".." in PurePosixPath(graph.file).parts:
                raise BundleError(f"{path} names {graph.file!r}, a file outside the bundle")
        return keys

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> EngineKeys:
        graphs = {
            name: GraphKeys(**{**graph, "inputs": tuple(graph["inputs"]), "outputs": tuple(graph["outputs"])})
            for name, graph in data["graphs"].items()
        }
        return cls(
            flavour=data["flavour"],
            version=data["version"],
            capabilities=tuple(int(capability) for capability in data["capabilities"]),
            driver=None if data["driver"] is None else int(data["driver"]),
            profiles=Profiles(**data["profiles"]),
            cache=data["cache"],
            graphs=graphs,
            notes=tuple(data["notes"]),
        )


@dataclass(frozen=True)
class Machine:
    """What is found where a bundle is loaded.

    Attributes:
        version: Version of the TensorRT library, in full.
        capability: Compute capability of the GPU, such as 89.
        driver: CUDA version that the driver supports, such as 13000.
    """

    version: str
    capability: int
    driver: int


def check_keys(keys: EngineKeys, found: Machine, bundle: Path) -> None:
    """Compares keys and files with a machine, before anything is deserialized.

    Serialized engines are loaded by the very release that built them, on a GPU that they were built for; a newer driver
    runs what an older one did.

    Raises:
        UnavailableError: The engines were built for another machine; the message says what differs and how to rebuild.
        BundleError: A file is missing or damaged.
    """
    title = TITLES[keys.flavour]
    differing = []
    if found.version != keys.version:
        differing.append(f"{title} {keys.version} built it, {found.version} is installed")
    if found.capability not in keys.capabilities:
        built_for = " or ".join(dotted(capability) for capability in keys.capabilities) or "none"
        differing.append(f"it is for compute capability {built_for}, the GPU has {dotted(found.capability)}")
    if keys.driver is not None and found.driver < keys.driver:
        differing.append(f"it needs a driver for CUDA {_cuda(keys.driver)}, this one is for {_cuda(found.driver)}")
    if differing:
        raise UnavailableError(
            f"the {keys.flavour} engine of {bundle} does not fit this machine: {'; '.join(differing)}: rebuild it "
            f"with qavp-export ... {rebuild_options(keys.flavour, found.capability)}"
        )
    check_files(keys, bundle)


def check_files(keys: EngineKeys, bundle: Path) -> None:
    """Compares an engine's files with its keys.

    Raises:
        BundleError: One is missing or damaged.
    """
    folder = bundle / engine_folder(keys.flavour)
    for graph in keys.graphs.values():
        _check_file(folder / graph.file, graph)


def rebuild_options(flavour: str, capability: int | None = None) -> str:
    """Returns the options of qavp-export that build a flavour for a compute capability."""
    if flavour == TENSORRT:
        return "--engine tensorrt on a machine with this GPU"
    if capability is not None and capability not in RTX_CAPABILITIES:
        return f"--engine tensorrt, since TensorRT-RTX does not build for compute capability {dotted(capability)}"
    return f"--engine {flavour} --sm {'NN' if capability is None else capability}"


def dotted(capability: int) -> str:
    """Returns a compute capability as it is usually written: 8.9 for 89."""
    return f"{capability // 10}.{capability % 10}"


def _check_file(path: Path, graph: GraphKeys) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing; export the bundle again")
    size = path.stat().st_size
    if size != graph.bytes:
        raise BundleError(f"{path} has {size} bytes, not {graph.bytes}; copy or export the bundle again")
    if _sha256(path) != graph.sha256:
        raise BundleError(f"{path} was changed after the export (other SHA-256); copy or export the bundle again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cuda(version: int) -> str:
    """Returns a CUDA version as it is usually written: 13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
