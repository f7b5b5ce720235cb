"""Checks the FP4 weights of a stored graph, for want of an engine on the CPU that runs NVFP4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.errors import ParityError
from qavp_export.numerics.nvfp4 import quantize_nvfp4_weight
from qavp_export.tracing import PARAMETER

ReadWeight = Callable[[str, tuple[int, int]], npt.NDArray[np.float32]]
"""Returns a parameter as float32 `[N,K]` from its name and shape."""

_Array = npt.NDArray[np.generic]


def check_nvfp4_weights(graph: Path, expected: ReadWeight) -> int:
    """Compares every FP4 weight of a graph with the reference's quantization of the weight, bit for bit.

    One weight is in memory at a time. The graph is not run.

    Args:
        graph: The saved graph.
        expected: Returns a parameter as float32 `[N, K]`, as the quantizing pass read it, from its name and shape. The
            name is the checkpoint's where the initializer carries it, else the initializer's without `.codes`.

    Returns:
        How many weights were compared.

    Raises:
        ParityError: A weight differs.
    """
    initializers = ir.load(graph).graph.initializers
    codes = [value for value in initializers.values() if value.dtype == ir.DataType.FLOAT4E2M1]
    for value in codes:
        base = str(value.name).removesuffix(".codes")
        parameter = value.metadata_props.get(PARAMETER, base)
        stored = _array(initializers, f"{base}.codes")
        outputs, channels = stored.shape
        wanted = quantize_nvfp4_weight(np.ascontiguousarray(expected(parameter, (outputs, channels))))
        _compare(parameter, "codes", stored, wanted.codes)
        for part, array in (("block_scales", wanted.block_scales), ("global_scale", wanted.global_scale)):
            _compare(parameter, part, _array(initializers, f"{base}.{part}"), array)
    return len(codes)


def _compare(parameter: str, part: str, stored: _Array, wanted: _Array) -> None:
    if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
        differing = wanted.size
    else:
        # As bits: -0 is not 0.
        unsigned = np.dtype(f"u{wanted.dtype.itemsize}")
        one, other = (np.ascontiguousarray(array).view(unsigned) for array in (stored, wanted))
        differing = int(np.count_nonzero(one != other))
    if differing:
        raise ParityError(
            f"{differing} of {wanted.size} NVFP4 {part} of {parameter} are not the checkpoint's; please report this"
        )


def _array(initializers: Mapping[str, ir.Value], name: str) -> _Array:
    value = initializers.get(name)
    if value is None or value.const_value is None:
        return np.empty(0)
    array: _Array = value.const_value.numpy()
    return array
