"""ONNX Runtime sessions: how they are set up, opened and run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.errors import BundleError, InputError, QavpError
from qavp_export.manifest import Manifest

Array = NDArray[Any]
Values = dict[str, ort.OrtValue]

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
FATAL = 4

_LEVELS: Mapping[str, ort.GraphOptimizationLevel] = MappingProxyType(
    {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
)


class Graph:
    """One opened graph. Serves calls from several threads at once.

    Attributes:
        inputs: Names of its inputs.
        outputs: Names of what `run` returns.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        options: EngineOptions,
        inputs: Collection[str],
        outputs: Sequence[str],
        weights: Iterable[tuple[str, Array]] = (),
        providers: Sequence[str] = (CPU_PROVIDER,),
    ) -> None:
        """Opens a graph and checks what it takes and returns.

        Args:
            name: What messages call it.
            path: Its file.
            options: How it is opened.
            inputs: Names of its inputs, all of them.
            outputs: Names of outputs that it has and `run` returns.
            weights: Values of initializers that the file names and does not hold; ONNX Runtime copies them.
            providers: Execution providers, best first.

        Raises:
            BundleError: The file is missing, cannot be opened, or has other inputs or outputs.
            InputError: An option is out of range.
        """
        self._name = name
        self.inputs = frozenset(inputs)
        self.outputs = tuple(outputs)
        if not path.is_file():
            raise BundleError(f"{path} is missing; export the bundle again")
        settings = session_options(options)
        values = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for key, array in weights}
        settings.add_external_initializers(list(values), list(values.values()))
        try:
            self._session = ort.InferenceSession(str(path), sess_options=settings, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise BundleError(f"{path} cannot be opened ({one_line(error)}); export the bundle again") from error
        found_inputs = {found.name for found in self._session.get_inputs()}
        missing = sorted(found_inputs ^ set(inputs))
        missing += sorted(set(outputs) - {found.name for found in self._session.get_outputs()})
        if missing:
            raise BundleError(
                f"{path} does not have the inputs and outputs of a {name} ({', '.join(missing[:4])} differ); "
                "export the bundle again"
            )

    def run(self, inputs: Values) -> Values:
        """Runs the graph once, without copies between steps."""
        try:
            values = self._session.run_with_ort_values(self.outputs, inputs)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise self._failed(error) from error
        return dict(zip(self.outputs, values, strict=True))

    def providers(self) -> list[str]:
        """Returns the execution providers that were loaded."""
        loaded: list[str] = self._session.get_providers()
        return loaded

    def bind(self) -> ort.IOBinding:
        """Returns what inputs and outputs can be bound to once for several runs."""
        return self._session.io_binding()

    def run_bound(self, binding: ort.IOBinding) -> None:
        """Runs the graph once on what is bound."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> QavpError:
        return QavpError(f"ONNX Runtime failed in the {self._name} ({one_line(error)})")


class GraphPipeline:
    """Graphs that run one after the other, each on what is given and what those before it returned.

    Attributes:
        inputs: Names of what is given.
    """

    def __init__(self, graphs: Sequence[Graph]) -> None:
        """Takes opened graphs, first to last."""
        self._graphs = tuple(graphs)
        self.inputs: frozenset[str] = frozenset()
        made: set[str] = set()
        for graph in self._graphs:
            self.inputs |= graph.inputs - made
            made.update(graph.outputs)

    def run(self, inputs: Values) -> Values:
        """Runs every graph once, and returns what they returned."""
        outputs: Values = {}
        for graph in self._graphs:
            known = inputs | outputs
            # What is missing ONNX Runtime names.
            outputs |= graph.run({name: known[name] for name in graph.inputs & known.keys()})
        return outputs


def open_graph(
    bundle: Path, manifest: Manifest, name: str, options: EngineOptions, inputs: Collection[str], outputs: Sequence[str]
) -> Graph:
    """Opens a canonical graph of a bundle; see `Graph`."""
    return Graph(name, graph_path(bundle, manifest, name), options, inputs, outputs)


def session_options(options: EngineOptions) -> ort.SessionOptions:
    """Returns the settings of a session on the CPU.

    Raises:
        InputError: An option is out of range.
    """
    if options.graph_optimization not in _LEVELS:
        raise InputError(f"graph_optimization is {options.graph_optimization!r}; choose one of {', '.join(_LEVELS)}")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; give 1 or more, or leave it out")
    settings = ort.SessionOptions()
    settings.graph_optimization_level = _LEVELS[options.graph_optimization]
    settings.intra_op_num_threads = options.threads or 0  # 0: one per physical core
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.enable_cpu_mem_arena = options.memory_arena
    # Each graph has its own threads. They wait for work by spinning while it runs, which is faster than to sleep, and
    # not after it, when the next graph needs the cores.
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.graph_optimization == "disable":
        # By default every weight would be cast to float32 before the first layer runs (1.1 GB for CLIP-L, 0.2 GB so).
        settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.log_severity_level = FATAL  # failures are raised; the log would only repeat them on stderr
    # On load, DequantizeLinear -> MatMul becomes MatMulNBits, which by default also rounds activations to 8
    # bits. 1 keeps them in float32, so that the graph computes what it says.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return settings


def graph_path(bundle: Path, manifest: Manifest, name: str) -> Path:
    """Returns the file of a component.

    Raises:
        BundleError: The manifest lacks the component or names a file outside the bundle.
    """
    component = manifest.components.get(name)
    if component is None:
        raise BundleError(f"the manifest of {bundle} has no component {name!r}; export the bundle again")
    relative = PurePosixPath(component.file)
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"the manifest of {bundle} names {component.file!r}, a file outside the bundle")
    return bundle / relative


def input_names(manifest: Manifest, name: str) -> list[str]:
    """Returns the inputs of a component, as the manifest lists them."""
    component = manifest.components.get(name)
    return [] if component is None else [spec.name for spec in component.inputs]


def value(array: FloatArray | IntArray, dtype: type[np.float32] | type[np.int64]) -> ort.OrtValue:
    """Returns an array as ONNX Runtime takes it, without a copy where type and layout fit."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype=dtype))


def one_line(error: Exception) -> str:
    """Returns an error's message without line breaks."""
    return " ".join(str(error).split())
