"""What the exporter built for an engine of ONNX Runtime: lowered graphs without weights, and what weights are made of.

Standard library only: the exporter writes it and the runtime reads it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qavp_export.engines.ort.weights import StoredTensor, WeightPlan
from qavp_export.errors import BundleError

PLAN_NAME = "engine.json"
CPU_FOLDER = "engines/ort-cpu"
CUDA_FOLDER = "engines/ort-cuda"
# The graph that takes what the vision encoder's returns, where that ends before tokens are selected.
SELECTION = "selection"
# Fewest tokens, padding among them, that graphs for prompts take: attention has as many tiles.
LEAST_PROMPT = 4


@dataclass(frozen=True)
class GraphPlan:
    """One lowered graph.

    Attributes:
        file: Its file, beside the plan.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        weights: Its initializers.
        precision: What its quantized linear layers run in, by the name of the canonical node.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[WeightPlan, ...]
    precision: Mapping[str, str]


@dataclass(frozen=True)
class EnginePlan:
    """All graphs of an engine.

    Attributes:
        graphs: The graphs by name.
        cache: `preallocated`, or `growing` where the decoder's attention could not be lowered.
        notes: What could not be lowered, a line each.
    """

    graphs: Mapping[str, GraphPlan]
    cache: str
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the plan beside its graphs."""
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":"))
        (folder / PLAN_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> EnginePlan:
        """Reads the plan in an engine's folder.

        Raises:
            BundleError: There is none, it cannot be read, or it names files outside the bundle.
        """
        path = folder / PLAN_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            graphs = {name: _graph(value) for name, value in data["graphs"].items()}
            plan = cls(graphs, data["cache"], tuple(data["notes"]))
        except FileNotFoundError:
            raise BundleError(f"{path} is missing; export the bundle again") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
        for file in plan.files():
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise BundleError(f"{path} names {file!r}, a file outside the bundle")
        return plan

    def check(self, bundle: Path, folder: Path) -> None:
        """Checks that the graphs are there and that the weights lie inside the bundle's files.

        Args:
            bundle: The bundle's folder.
            folder: The plan's own.

        Raises:
            BundleError: A graph is missing, or a weight reaches beyond a file.
        """
        for name, graph in self.graphs.items():
            if not (folder / graph.file).is_file():
                raise BundleError(f"{folder / graph.file} is missing; export the bundle again")
            for weight in graph.weights:
                for part in weight.parts.values():
                    path = bundle / part.file
                    if not path.is_file() or path.stat().st_size < part.offset + part.length:
                        raise BundleError(f"{path} does not hold {weight.name!r} of graph {name!r}; export again")

    def files(self) -> set[str]:
        """Returns every file that the plan names."""
        parts = {part.file for graph in self.graphs.values() for plan in graph.weights for part in plan.parts.values()}
        return parts | {graph.file for graph in self.graphs.values()}


def _graph(data: Mapping[str, Any]) -> GraphPlan:
    weights = tuple(
        WeightPlan(
            name=weight["name"],
            form=weight["form"],
            parts={
                role: StoredTensor(part["file"], part["offset"], part["length"], part["dtype"], tuple(part["shape"]))
                for role, part in weight["parts"].items()
            },
            block=weight["block"],
        )
        for weight in data["weights"]
    )
    return GraphPlan(data["file"], tuple(data["inputs"]), tuple(data["outputs"]), weights, dict(data["precision"]))
