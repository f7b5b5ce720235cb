"""Which layers lose most at their precision, measured on calibration prompts, and which of them to raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.calibration.stops import Stop, find_stops
from qavp_export.calibration.walk import Walk
from qavp_export.passes import Scheme, WeightQuantizer
from qavp_export.passes.quantizer import quantize_activation

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sensitivity:
    """One layer's loss.

    Attributes:
        node: Name of its MatMul node.
        error: Mean over tokens of `norm2(y - y^)^2 / norm2(y)^2`, where y is the layer's output in float on the float
            model's input, and y^ the same with weight and input quantized.
        size: Elements of its weight.
    """

    node: str
    error: float
    size: int


def measure_sensitivity(
    walk: Walk,
    model: ir.Model,
    schemes: Mapping[str, Scheme],
    group_size: int,
    quantizer: WeightQuantizer,
    progress: Callable[[int, int], None],
) -> list[Sensitivity]:
    """Measures every layer on the same input, the float model's: one pass, whatever the number of layers.

    Args:
        walk: A walk over the float model, rotated already.
        model: That model.
        schemes: The scheme of each layer by node name.
        group_size: Channels that share a scale.
        quantizer: Rounds the weights.
        progress: Called with layers done and layers in all.

    Returns:
        The layers in graph order.
    """
    found: list[Sensitivity] = []
    for stop in find_stops(model, schemes):
        progress(len(found), len(schemes))
        walk.advance([stop.value])
        found += [_measure(walk, stop, node, schemes[str(node.name)], group_size, quantizer) for node in stop.nodes]
    return found


def choose_raised(measured: list[Sensitivity], budget: float) -> list[Sensitivity]:
    """Chooses the layers to raise from 4 to 8 bit: largest error per element first, as long as they fit the budget.

    Args:
        measured: All layers at 4 bit.
        budget: Fraction by which their weights may grow in all.
    """
    left = budget * sum(layer.size for layer in measured)
    raised = []
    for layer in sorted(measured, key=lambda layer: (-layer.error / layer.size, layer.node)):
        # From 4 to 8 bit a weight grows by its own size.
        if layer.size <= left:
            raised.append(layer)
            left -= layer.size
    return raised


def _measure(
    walk: Walk, stop: Stop, node: ir.Node, scheme: Scheme, group_size: int, quantizer: WeightQuantizer
) -> Sensitivity:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        raise TypeError(f"{node.name} has no constant weight")
    values = walk.weight(weight).T
    rounded = quantizer(weight, scheme, group_size).dequantize().T
    total, tokens = 0.0, 0
    for x in walk.read(stop.value):
        rows = x.reshape(-1, x.shape[-1])
        exact = rows @ values
        error = exact - quantize_activation(rows, scheme, group_size) @ rounded
        sizes = np.square(exact).sum(axis=-1)
        total += float((np.square(error).sum(axis=-1)[sizes > 0] / sizes[sizes > 0]).sum())
        tokens += len(rows)
    return Sensitivity(str(node.name), total / max(tokens, 1), values.size)
