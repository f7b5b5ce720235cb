"""The decoder's linear layers, in PyTorch, as the graph has them: rotated weights, stored codes, quantized inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qavp_export.engines import FloatArray, IntArray
from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes import LayerRotation
from qavp_export.settings import Settings

if TYPE_CHECKING:
    from qavp_export.parity.weights import WeightComparison


@dataclass(frozen=True)
class DecoderLayer:
    """One linear layer of the exported decoder.

    Attributes:
        module: Its name in the Hugging Face model.
        precision: Its realized precision, for example `w4a4` or `float32`.
        activation: Name of the graph's value that holds its quantized input; None if its input is float.
        weight: Name of the graph's initializer that holds its weight or codes.
        rotation: What was folded into it.
        gain: Name of the norm's parameter in the Hugging Face model that was folded into it; None if none was.
    """

    module: str
    precision: str
    activation: str | None
    weight: str
    rotation: LayerRotation = field(default_factory=LayerRotation)
    gain: str | None = None


@dataclass
class Agreement:
    """How quantized values of the graph compare with the reference's.

    Attributes:
        compared: Values compared.
        differing: Values that are off by a code: float rounding moved them across a rounding boundary.
        worst: Largest distance, in steps of the reference's grid.
    """

    compared: int = 0
    differing: int = 0
    worst: float = 0.0

    def add(self, own: TwoLevel | OneLevel, graph: FloatArray, rows: npt.NDArray[np.bool_] | None = None) -> None:
        """Counts values `[..., K]`; `rows [...]` says which vectors count."""
        values = own.dequantize()
        scales = own.scales() if isinstance(own, TwoLevel) else own.scales
        steps = np.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)
        distance = np.abs(values - graph) / np.where(steps > 0, steps, np.float32(1))
        if rows is not None:
            distance = distance[rows]
        self.compared += distance.size
        self.differing += int((distance > 0.5).sum())
        self.worst = max(self.worst, float(distance.max(initial=0)))

    def merge(self, other: Agreement) -> None:
        """Takes in another comparison."""
        self.compared += other.compared
        self.differing += other.differing
        self.worst = max(self.worst, other.worst)


def quantize_weight(weight: FloatArray, precision: str, settings: Settings) -> TwoLevel | OneLevel:
    """Rounds a weight `[N,K]` to nearest, as `numerics/` says and the recipe asks."""
    group_size, recipe = settings.group_size, settings.recipe
    if precision == "w8a8":
        return quantize_one_level(weight, weight.shape[1], 8)
    if precision.startswith("w8"):
        return quantize_one_level(weight, group_size, 8)
    if recipe.scales == "two-level":
        two_level = quantize_two_level_clipped if recipe.clip_search else quantize_two_level
        return two_level(weight, group_size)
    if recipe.clip_search:
        return quantize_one_level_clipped(weight, group_size)
    return quantize_one_level(weight, group_size, 4)


def quantize_activation(values: FloatArray, precision: str, settings: Settings) -> TwoLevel | OneLevel:
    """Quantizes activations `[..., K]` as `numerics/` says and the recipe asks."""
    if precision.endswith("a8"):
        return quantize_one_level(values, values.shape[-1], 8)
    if settings.recipe.scales == "two-level":
        return quantize_two_level(values, settings.group_size)
    return quantize_one_level(values, settings.group_size, 4)


class LayerHooks:
    """Makes a layer's module compute what the graph's layer does: quantized input times weight, in the rotated basis.

    The weight is in the module only while it runs.

    Args:
        layer: The layer.
        settings: The recipe, with every choice made.
        weights: Gives the graph's weight, compared with what it should be.
        steps: For each forward pass the graph's quantized input `[B,S,K]`, if it has one, and which tokens count.
        agreement: Counts how the codes compare.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        settings: Settings,
        weights: WeightComparison,
        steps: Iterator[tuple[FloatArray, IntArray]],
        agreement: Agreement,
    ) -> None:
        self._layer = layer
        self._settings = settings
        self._weights = weights
        self._steps = steps
        self._agreement = agreement
        self._own: tuple[nn.Parameter, nn.Parameter | None] | None = None

    def before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Forward pre-hook: rotates the input, compares its codes with the graph's and goes on with the graph's."""
        linear: Any = module
        self._own = linear.weight, linear.bias
        weight, bias = self._weights.take(self._layer, linear)
        linear.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(torch.from_numpy(bias), requires_grad=False)
        values = args[0].numpy()
        for rotation in self._layer.rotation.inputs:
            values = rotation.apply(values)
        values = values.astype(np.float32)
        if self._layer.activation is not None:
            graph, valid = next(self._steps)
            own = quantize_activation(values, self._layer.precision, self._settings)
            self._agreement.add(own, graph, valid.astype(bool))
            values = graph
        return (torch.from_numpy(values),)

    def after(self, module: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook: turns the output back into the model's own basis."""
        linear: Any = module
        if self._own is not None:
            linear.weight, linear.bias = self._own
        rotation = self._layer.rotation.output
        if rotation is None:
            return output
        return torch.from_numpy(rotation.undo(output.numpy()).astype(np.float32))
