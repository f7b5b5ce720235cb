"""Registers the plugins with real TensorRT bindings and asks them what TensorRT asks, in a process of its own.

Run as a script (`plugin_probe.py BINDINGS`) it reads cases as JSON and writes reports. There is no library behind the
bindings: `stub_libraries` makes three that export the functions which the bindings link to, each returning null. That
is enough to import `tensorrt.plugin`, to check signatures, and to drive its plugin classes by hand: expressions, which
only a real builder makes, are replaced by `_Expr`.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

CAPABILITY = 80
# What the bindings link to, by library.
_SYMBOLS = {
    "nvinfer": [
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ],
    "nvonnxparser": ["createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion"],
    "nvinfer_plugin": ["initLibNvInferPlugins"],
}
Case = dict[str, Any]
Report = dict[str, Any]


def stub_libraries(folder: Path, major: int) -> None:
    """Compiles libraries of TensorRT's names whose functions return null."""
    for library, symbols in _SYMBOLS.items():
        name = f"lib{library}.so.{major}"
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True, timeout=60)


def probe(bindings: Path, libraries: Path, cases: Sequence[Case]) -> list[Report]:
    """Asks the plugins for each case, in a new process.

    Args:
        bindings: Folder with `tensorrt_bindings`, and NumPy if it needs another.
        libraries: Folder of the stub libraries.
        cases: For each a plugin's `name`, its `inputs` (pairs of TensorRT's type name and shape; a negative size -i is
            the i-th token count that is open), `attributes`, `opt` and `most` for the open sizes, and `tokens`: the
            open sizes to evaluate expressions at.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__)), str(bindings)]
    result = subprocess.run(
        command,
        input=json.dumps(list(cases)),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    if result.returncode:
        raise RuntimeError(f"the probe ended with {result.returncode}: {result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


class _Expr:
    """Stands for TensorRT's expressions of sizes, which only its builder makes."""

    def __init__(self, value: Callable[[Sequence[int]], int], constant: bool) -> None:
        self.value = value
        self._constant = constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        return self.value([])


class _ExprBuilder:
    """Stands for TensorRT's builder of expressions."""

    def __init__(self, trt: ModuleType) -> None:
        operations = trt.DimensionOperation
        self._operations: Mapping[Any, Callable[[int, int], int]] = {
            operations.SUM: operator.add,
            operations.SUB: operator.sub,
            operations.PROD: operator.mul,
            operations.FLOOR_DIV: operator.floordiv,
            operations.CEIL_DIV: lambda a, b: -(-a // b),
            operations.MAX: max,
            operations.MIN: min,
            operations.LESS: operator.lt,
        }

    def constant(self, value: int) -> _Expr:
        return _Expr(lambda _: value, constant=True)

    def open_size(self, index: int) -> _Expr:
        return _Expr(lambda sizes: sizes[index], constant=False)

    def operation(self, kind: Any, first: _Expr, second: _Expr) -> _Expr:
        function = self._operations[kind]
        both = first.is_constant() and second.is_constant()
        return _Expr(lambda sizes: function(first.value(sizes), second.value(sizes)), both)


class _Bag:
    """Takes what TensorRT's own objects would take."""

    def __init__(self) -> None:
        self.items: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.items[index] = value


def _load(bindings: str) -> ModuleType:
    sys.path.insert(0, bindings)
    trt = importlib.import_module("tensorrt_bindings")
    # Without the package of that name, which brings the libraries, the bindings still refer to it.
    sys.modules["tensorrt"] = trt
    return trt


def _main(bindings: str, cases: list[Case]) -> list[Report]:
    trt = _load(bindings)
    from qavp_export.engines.tensorrt.plugins import register_plugins

    register_plugins(trt, CAPABILITY, lazy=True)
    # Again: nothing is defined twice.
    register_plugins(trt, CAPABILITY, lazy=True)
    tensors = importlib.import_module("tensorrt_bindings.plugin._tensor")
    trt.IDimensionExpr = _Expr  # type: ignore[attr-defined]
    trt.DimsExprs = lambda length: [None] * length  # type: ignore[attr-defined]
    tensors.SymExprImpl = lambda expr: expr._expr  # type: ignore[attr-defined]
    return [_ask(trt, case) for case in cases]


def _ask(trt: Any, case: Case) -> Report:
    library = importlib.import_module("tensorrt_bindings.plugin._lib")
    import numpy as np

    definition = library.QDP_REGISTRY[f"qavp::{case['name']}"]
    kinds = library._built_in_to_plugin_field_type
    fields = [
        trt.PluginField(name, np.array([case["attributes"][name]]), kinds[kind])
        for name, kind in definition.input_attrs.items()
    ]
    creator = library._TemplatePluginCreator(
        case["name"], "qavp", {name: (True, kind) for name, kind in definition.input_attrs.items()}
    )
    plugin = creator.create_plugin(
        case["name"],
        "qavp",
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    builder = _ExprBuilder(trt)
    types = [getattr(trt.DataType, name) for name, _ in case["inputs"]]
    output_types = plugin.get_output_data_types(types, [len(shape) for _, shape in case["inputs"]])
    exprs = [
        [builder.open_size(-size - 1) if size < 0 else builder.constant(size) for size in shape]
        for _, shape in case["inputs"]
    ]
    shapes = plugin.get_output_shapes(exprs, [], builder)
    evaluated = [[expr.value(case["tokens"]) for expr in shape] for shape in shapes]
    described = [_dynamic(trt, case, kind, shape) for kind, (_, shape) in zip(types, case["inputs"], strict=True)]
    for kind, shape in zip(output_types, shapes, strict=True):
        sizes = [expr.value([]) if expr.is_constant() else -1 for expr in shape]
        described.append(_dynamic(trt, case, kind, sizes))
    inputs = len(types)
    combinations = plugin.get_supported_format_combinations(described, inputs)
    plugin.configure_plugin(described[:inputs], described[inputs:])
    launches = []
    for tactic in sorted(plugin.get_valid_tactics()):
        plugin.set_tactic(tactic)
        launches.append(_launch(plugin, described, inputs, builder, case["tokens"]) | {"tactic": tactic})
    return {
        "types": [kind.name for kind in output_types],
        "shapes": evaluated,
        "combinations": [kind.type.name for kind in combinations],
        "launches": launches,
    }


def _dynamic(trt: Any, case: Case, kind: Any, shape: Sequence[int]) -> Any:
    desc = trt.DynamicPluginTensorDesc()
    flat = trt.PluginTensorDesc()
    flat.dims, flat.type, flat.format = [max(-1, size) for size in shape], kind, trt.TensorFormat.LINEAR
    desc.desc = flat
    for name, sizes in (("min", [1] * 8), ("opt", case["opt"]), ("max", case["most"])):
        setattr(desc, name, [sizes[-size - 1] if size < 0 else size for size in shape])
    return desc


def _launch(plugin: Any, described: Sequence[Any], inputs: int, builder: _ExprBuilder, tokens: list[int]) -> Report:
    parameters, scalars = _Bag(), _Bag()
    plugin.get_launch_params(None, described, inputs, parameters, scalars, builder)
    name, ptx = plugin.get_kernel([d.desc for d in described[:inputs]], [d.desc for d in described[inputs:]])
    fields = vars(parameters)
    return {
        "kernel": name,
        "is_entry": bool(re.search(rf"\.visible \.entry {name}\(", ptx.decode())),
        "target": re.search(r"\.target (\w+)", ptx.decode())[1],  # type: ignore[index]
        "arguments": re.findall(r"\.param \.(\w+)", ptx.decode()),
        "grid": [fields[f"grid_{axis}"].value(tokens) for axis in "xyz"],
        "block": [fields[f"block_{axis}"].value(tokens) for axis in "xyz"],
        "shared": fields["shared_mem"].value(tokens),
        "scalars": [scalars.items[index].value(tokens) for index in range(scalars.nbSymExprs)],  # type: ignore[attr-defined]
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_main(sys.argv[1], json.load(sys.stdin))) + "\n")
