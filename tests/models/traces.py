"""Traces each tiny module once for all tests: torch.onnx.export takes seconds, and weights have no part in it.

The graphs lie in a folder that pytest-xdist's workers share, and those who wait for the same one wait for a lock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import onnx
import onnx_ir as ir
import pytest
from filelock import FileLock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig

from qavp_export.tracing import PARAMETER, trace
from qavp_export.tracing.trace import WeightSource

Tracer: TypeAlias = Callable[[trace._Request, FakeTensorMode, Mapping[int, str], WeightSource], ir.Model]

# Metadata key of a stored graph: the names of its initializers, as what was traced has them.
_ORDER = "order"
# What every module has of its own is no setting.
_BOOKKEEPING = frozenset(vars(nn.Module()))


@contextmanager
def traced_once(folder: Path) -> Iterator[Tracer]:
    """Makes traces of equal modules reuse one graph, which lies in a folder. Yields what traces anew."""
    anew = trace._trace

    def reuse(
        request: trace._Request, mode: FakeTensorMode, modules: Mapping[int, str], weights: WeightSource
    ) -> ir.Model:
        path = folder / f"{_digest(request, modules)}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                onnx.save(_without_weights(anew(request, mode, modules, _unread)), path)
        return _with_weights(onnx.load(path), weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_trace", reuse)
        yield anew


def _unread(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    def read() -> NoReturn:
        raise AssertionError(f"{name} was read while it was traced")

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """Serializes a graph whose parameters have become its last inputs."""
    graph = model.graph
    model.metadata_props[_ORDER] = json.dumps(list(graph.initializers))
    for value in [value for value in graph.initializers.values() if PARAMETER in value.metadata_props]:
        graph.initializers.pop(str(value.name))
        value.const_value = None
        graph.inputs.append(value)
    return ir.to_proto(model)


def _with_weights(proto: onnx.ModelProto, weights: WeightSource) -> ir.Model:
    """Undoes `_without_weights`, with weights."""
    model = ir.from_proto(proto)
    graph = model.graph
    found = {str(value.name): value for value in graph.initializers.values()}
    graph.initializers.clear()
    for value in [value for value in graph.inputs if PARAMETER in value.metadata_props]:
        graph.inputs.remove(value)
        value.const_value = weights(value.metadata_props[PARAMETER], value.shape.numpy())
        found[str(value.name)] = value
    for name in json.loads(model.metadata_props.pop(_ORDER)):
        graph.register_initializer(found[name])
    return model


def _digest(request: trace._Request, modules: Mapping[int, str]) -> str:
    """Stands for all that a trace depends on: modules and their settings, buffers, parameters and what is fed."""
    found = hashlib.sha256()
    for part in _parts(request, modules):
        # Where an object lies says nothing, nor where a configuration came from.
        found.update(re.sub(r" at 0x[0-9a-f]+|'_?name_or_path'[:,] '[^']*'", "", repr(part)).encode())
    return found.hexdigest()


def _parts(request: trace._Request, modules: Mapping[int, str]) -> Iterator[Any]:
    leaves, structure = pytree.tree_flatten(request.args)
    yield request.inputs, request.outputs, request.dynamic_shapes, structure
    yield [(leaf.shape, leaf.dtype) for leaf in leaves]
    configs: dict[int, Any] = {}
    for name, module in request.module.named_modules():
        yield name, modules.get(id(module)), type(module)
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                # Most modules hold one of a few.
                if id(value) not in configs:
                    configs[id(value)] = len(configs), type(value), value.to_dict(), value._attn_implementation
                    yield configs[id(value)]
                yield key, configs[id(value)][0]
            elif key not in _BOOKKEEPING:
                yield key, value
    first: dict[int, str] = {}
    for name, parameter in request.module.named_parameters(remove_duplicate=False):
        # Tied ones are one tensor.
        yield name, first.setdefault(id(parameter), name), parameter.shape, parameter.dtype
    for name, buffer in request.module.named_buffers():
        yield name, buffer.shape, buffer.dtype
        if not isinstance(buffer, FakeTensor):
            yield buffer.numpy().tobytes()
