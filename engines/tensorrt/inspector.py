"""Reads what a builder made of a network: the layers of an engine, and the precision that each ONNX node runs in.

Standard library only. TensorRT tells of layers as JSON (`IEngineInspector`, which needs a GPU) or as lines of its log
(`ProfilingVerbosity.DETAILED`, which does not); both name data types of what a layer reads and the ONNX nodes in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "float": "float32",
        "fp32": "float32",
        "tf32": "float32",
        "half": "float16",
        "fp16": "float16",
        "bfloat16": "bfloat16",
        "bf16": "bfloat16",
        "int4": "int4",
        "int8": "int8",
        "fp8": "fp8",
        "fp4": "fp4",
        "fp4e2m1": "fp4",
        "int32": "int32",
        "int64": "int64",
        "bool": "bool",
    }
)
_BITS: Mapping[str, int] = MappingProxyType(
    {"fp4": 4, "int4": 4, "fp8": 8, "int8": 8, "float16": 16, "bfloat16": 16, "float32": 32}
)
# Kinds of layers that multiply matrices, as substrings of what TensorRT 10, 11 and RTX call them.
_PRODUCTS = ("gemm", "matrix", "conv", "correlation", "fc", "plugin")
_TENSOR = re.compile(r"Name: (?P<name>[^,]*), Dimensions: \[(?P<sizes>[-\d,]*)\].*?Datatype: (?P<type>\w+)")
_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Tensor:
    """What a layer reads: its data type, and its sizes (-1: dynamic)."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Returns how many numbers it holds; dynamic axes count as one."""
        count = 1
        for size in self.sizes:
            count *= abs(size)
        return count


@dataclass(frozen=True)
class EngineLayer:
    """A layer of an engine.

    Attributes:
        name: Its name.
        kind: What it is: `gemm`, `kgen`, `runtime_fusion`, `PluginV3`, ...
        inputs: What it reads at run time.
        constants: What the engine holds for it.
        nodes: The ONNX nodes that it computes, or parts of them.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        kind = self.kind.lower()
        # `__myl_...Fc...` of kind runtime_fusion is a product fused with what is around it.
        fused = kind == "runtime_fusion" or "mha" in self.name or "gemm" in self.name
        return fused or any(part in kind for part in _PRODUCTS)


def parse_log(lines: Iterable[str]) -> list[EngineLayer]:
    """Reads the layers in a builder's log."""
    return [_layer_of_line(line) for line in lines if line.startswith("Name: ") and ", LayerType: " in line]


def parse_json(text: str) -> list[EngineLayer]:
    """Reads what `IEngineInspector.get_engine_information` returns as JSON.

    Raises:
        ValueError: It is not that; layers are told of by name only where the engine was built without detail.
    """
    data = json.loads(text)
    layers = data.get("Layers") if isinstance(data, dict) else None
    if not isinstance(layers, list) or any(not isinstance(layer, dict) for layer in layers):
        raise ValueError("the engine inspector tells no details of layers")
    return [_layer_of_json(layer) for layer in layers]


def realized_precision(layers: Sequence[EngineLayer], nodes: Iterable[str]) -> dict[str, str]:
    """Tells what ONNX nodes run in.

    Args:
        layers: The engine's layers.
        nodes: The nodes: linear layers, convolutions, attention, plugins.

    Returns:
        For each node: `weights x activations` (`int4 x float32`) for a product with a constant, one type (`float16`)
        for one without, `plugin`, or `unknown` where no layer names the node.
    """
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    return {node: _precision(_layers_of(node, by_node)) for node in nodes}


def mismatches(expected: Mapping[str, str], realized: Mapping[str, str]) -> list[str]:
    """Says where an engine runs in another precision than its network asks for, a line each."""
    return [
        f"{node} runs in {realized[node]}, not {wanted}"
        for node, wanted in expected.items()
        if realized[node] != wanted
    ]


def _layers_of(node: str, by_node: Mapping[str, list[EngineLayer]]) -> list[EngineLayer]:
    # A function's node is named inside its layers' names only behind a slash.
    found = by_node.get(node) or [
        layer for name, layers in by_node.items() if name.startswith(f"{node}/") for layer in layers
    ]
    products = [layer for layer in found if layer.is_product]
    return products or found


def _precision(layers: Sequence[EngineLayer]) -> str:
    if any("plugin" in layer.kind.lower() for layer in layers):
        return "plugin"
    floats = [tensor for layer in layers for tensor in layer.inputs if tensor.dtype in _BITS]
    if not floats:
        return "unknown"
    weights = [_weight(layer) for layer in layers]
    known = [weight for weight in weights if weight is not None]
    if not known:
        # Attention: its widest product.
        return max((tensor.dtype for tensor in floats), key=lambda dtype: _BITS[dtype])
    # Beside codes there are their scales, and beside the input what is added to the product.
    activations = min((tensor.dtype for tensor in floats), key=lambda dtype: _BITS[dtype])
    return f"{known[0].dtype} x {activations}"


def _weight(layer: EngineLayer) -> Tensor | None:
    """Returns the largest matrix among a product's constants; where it is expanded in every run, its second input."""
    matrices = [tensor for tensor in layer.constants if len(tensor.sizes) > 1 and tensor.dtype in _BITS]
    matrices = [tensor for tensor in matrices if sum(size > 1 for size in tensor.sizes) > 1]
    if matrices:
        return max(matrices, key=lambda tensor: tensor.elements)
    static = [tensor for tensor in layer.inputs[1:] if len(tensor.sizes) > 1 and min(tensor.sizes) > 0]
    return static[0] if static and layer.is_product else None


def _layer_of_line(line: str) -> EngineLayer:
    head, _, rest = line.partition(", Inputs: [")
    inputs, _, rest = rest.partition("], Constants: [")
    constants, _, rest = rest.partition("], Outputs: [")
    name, _, kind = head.removeprefix("Name: ").rpartition(", LayerType: ")
    nodes = tuple(_bare(node) for node in _NODES.findall(rest))
    return EngineLayer(name, kind, _tensors_of_line(inputs), _tensors_of_line(constants), nodes)


def _tensors_of_line(text: str) -> tuple[Tensor, ...]:
    found = []
    for part in text.split("}, {"):
        match = _TENSOR.search(part)
        if match:
            sizes = tuple(int(size) for size in match["sizes"].split(",") if size)
            found.append(Tensor(_dtype(match["type"]), sizes))
    return tuple(found)


def _layer_of_json(layer: Mapping[str, Any]) -> EngineLayer:
    inputs, constants = (
        tuple(_tensor_of_json(value) for value in layer.get(key, ())) for key in ("Inputs", "Constants")
    )
    metadata = str(layer.get("Metadata", ""))
    nodes = tuple(_bare(node) for part in metadata.split("\x1e") for node in _NODES.findall(part))
    kind = str(layer.get("LayerType", ""))
    return EngineLayer(str(layer.get("Name", "")), kind, inputs, constants, nodes)


def _tensor_of_json(tensor: Mapping[str, Any]) -> Tensor:
    sizes = tuple(int(size) for size in tensor.get("Dimensions", ()))
    if "Datatype" in tensor:
        return Tensor(_dtype(str(tensor["Datatype"])), sizes)
    # TensorRT 10 says `Row major linear FP16 format`.
    words = str(tensor.get("Format/Datatype", tensor.get("Format", ""))).lower().split()
    return Tensor(next((_TYPES[word] for word in words if word in _TYPES), "unknown"), sizes)


def _dtype(name: str) -> str:
    return _TYPES.get(name.lower(), name.lower())


def _bare(node: str) -> str:
    """Returns a node's name without that of the function call it comes from: `inner | /call (Function)`."""
    _, _, call = node.rpartition(" | ")
    return call.rsplit(" (", 1)[0] if " | " in node else node
