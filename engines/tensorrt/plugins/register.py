"""Registers the plugins with TensorRT: versions 10.13 and newer, and 11."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import GenericAlias, ModuleType
from typing import Any

import numpy as np

from qavp_export.engines.tensorrt.plugins.linear import QuantizeTwoLevel, W4A4MatMul
from qavp_export.engines.tensorrt.plugins.plugin import Compiler, Launch, Plugin, Setting, Tensor
from qavp_export.engines.tensorrt.plugins.score import MixTokenScore, TokenSensitivity
from qavp_export.engines.tensorrt.plugins.select import SelectDpp, SelectMaxmin, TokenCodes, TokenProducts
from qavp_export.errors import UnavailableError
from qavp_export.passes.hybrid_score import PLUGIN_NAMESPACE

PLUGINS: tuple[type[Plugin], ...] = (
    TokenSensitivity,
    MixTokenScore,
    TokenCodes,
    TokenProducts,
    SelectDpp,
    SelectMaxmin,
    QuantizeTwoLevel,
    W4A4MatMul,
)

_WARP = 32
# Older Python bindings read an integer attribute in a way that NumPy 2.4 refuses.
_READS_SCALARS = (11, 2)
_TYPE_NAMES = {"FLOAT": "FP32", "HALF": "FP16"}


def register_plugins(trt: ModuleType, capability: int, lazy: bool = False) -> None:
    """Registers every plugin, so that TensorRT's ONNX parser finds it; again for another capability if called again.

    Args:
        trt: The module `tensorrt`, 10.13 or newer; TensorRT-RTX has no such plugins.
        capability: The compute capability that kernels are compiled for: that of the GPU that will run the engine, or
            80 for any that is not older.
        lazy: Leave TensorRT's own registry alone, which needs its libraries: this only checks the signatures.

    Raises:
        UnavailableError: This TensorRT has no such plugins, or does not work with the NumPy that is installed.
    """
    plugin_module = _plugin_module(trt)
    compiler = Compiler(capability)
    for kind in PLUGINS:
        _register(plugin_module, trt, kind(), compiler, lazy)


def _plugin_module(trt: ModuleType) -> Any:
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise UnavailableError(
            f"{trt.__name__} {trt.__version__} has no plugins with kernels compiled ahead of time; TensorRT 10.13 has"
        )
    if _version(trt) < _READS_SCALARS and _version(np) >= (2, 4):
        raise UnavailableError(
            f"the plugins of TensorRT {trt.__version__} do not work with NumPy {np.__version__}: "
            "pip install 'numpy<2.4', or TensorRT 11.2"
        )
    return importlib.import_module(f"{trt.__name__}.plugin")


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


def _register(module: Any, trt: ModuleType, plugin: Plugin, compiler: Compiler, lazy: bool) -> None:
    identifier = f"{PLUGIN_NAMESPACE}::{plugin.name}"
    desc = module.TensorDesc
    described = GenericAlias(tuple, (desc,) * len(plugin.outputs))
    tensors = [(name, desc) for name in plugin.inputs]
    settings = list(plugin.settings.items())
    outputs = ("outputs", GenericAlias(tuple, (desc,)))

    def describe(*arguments: Any, **attributes: Any) -> Any:
        values = {name: kind(attributes[name]) for name, kind in settings}
        shapes = plugin.shapes([tuple(tensor.shape_expr) for tensor in arguments], values)
        return tuple(
            module.from_shape_expr(shape, getattr(trt.DataType, dtype))
            for shape, dtype in zip(shapes, plugin.outputs, strict=True)
        )

    def autotune(*arguments: Any) -> Any:
        inputs, attributes = _split(plugin, arguments)
        types = [*(tensor.dtype.name for tensor in arguments[: len(inputs)]), *plugin.outputs]
        names = ", ".join(_TYPE_NAMES.get(name, name) for name in types)
        return [module.AutoTuneCombination(names, "LINEAR", plugin.tactics(inputs, attributes, compiler))]

    def aot(*arguments: Any) -> Any:
        inputs, attributes = _split(plugin, arguments)
        tactic = arguments[-1]
        return _launched(module, plugin.launch(inputs, attributes, tactic, compiler, module.cdiv))

    launched = GenericAlias(tuple, (str, str, module.KernelLaunchParams, module.SymIntExprs))
    _sign(describe, [*tensors, *settings], described)
    _sign(autotune, [*tensors, *settings, outputs], GenericAlias(list, (module.AutoTuneCombination,)))
    _sign(aot, [*tensors, *settings, outputs, ("tactic", int)], launched)
    if not hasattr(getattr(module.op, PLUGIN_NAMESPACE, None), plugin.name):
        module.register(identifier, lazy_register=lazy)(describe)
    module.autotune(identifier)(autotune)
    module.aot_impl(identifier)(aot)


def _sign(function: Callable[..., Any], parameters: list[tuple[str, Any]], result: Any) -> None:
    """Gives a function the signature that TensorRT checks: real types, under the names of tensors and attributes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=result,
    )
    function.__signature__ = signature  # type: ignore[attr-defined]  # what inspect.signature reads


def _split(plugin: Plugin, arguments: tuple[Any, ...]) -> tuple[list[Tensor], dict[str, Setting]]:
    """Reads TensorRT's arguments: tensors, then attributes in the order of their registration."""
    count = len(plugin.inputs)
    values = arguments[count : count + len(plugin.settings)]
    settings = {name: kind(value) for (name, kind), value in zip(plugin.settings.items(), values, strict=True)}
    return [Tensor.of(tensor) for tensor in arguments[:count]], settings


def _launched(module: Any, launch: Launch) -> tuple[str, str, Any, Any]:
    parameters = module.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = launch.grid
    parameters.block_x = launch.kernel.num_warps * _WARP
    parameters.shared_mem = launch.kernel.shared_bytes
    scalars = module.SymIntExprs(len(launch.scalars))
    for index, scalar in enumerate(launch.scalars):
        scalars[index] = module.SymInt32(scalar)
    return launch.kernel.name, launch.kernel.ptx, parameters, scalars
