"""The decoder's linear layers, in PyTorch, as the graph has them: rotated weights, stored codes, quantized inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from qavp_export.engines import FloatArray, IntArray
from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes import LayerRotation
from qavp_export.settings import Settings


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


class LayerFolder:
    """Gives a Hugging Face decoder the graph's weights.

    Args:
        model: The Hugging Face model, float32.
        settings: The recipe, with every choice made.
        graph: The decoder's graph.

    Attributes:
        agreement: How the graph's weights compare with rounding to nearest of the reference's.
        smallest_cosine: Smallest cosine similarity of a weight that was not rounded to nearest; such a
            weight need not be near the original, but points the same way.
    """

    def __init__(self, model: Any, settings: Settings, graph: Path) -> None:
        self.agreement = Agreement()
        self.smallest_cosine = 1.0
        self._model = model
        self._settings = settings
        self._stored = ir.load(graph).graph.initializers

    def fold(self, layers: list[DecoderLayer]) -> None:
        """Replaces the weights of all layers; norm gains that went into weights become ones."""
        for layer in layers:
            self._fold(layer)
        for name in {layer.gain for layer in layers if layer.gain is not None}:
            gain = self._model.get_parameter(name)
            gain.data = torch.ones_like(gain)

    def _fold(self, layer: DecoderLayer) -> None:
        linear = self._model.get_submodule(layer.module)
        weight = linear.weight.detach().numpy().astype(np.float64)
        if layer.gain is not None:
            weight = weight * self._model.get_parameter(layer.gain).detach().numpy()
        for rotation in layer.rotation.inputs:
            weight = rotation.apply(weight)
        if layer.rotation.output is not None:
            weight = layer.rotation.output.apply(weight.T).T
            if linear.bias is not None:
                bias = layer.rotation.output.apply(linear.bias.detach().numpy()).astype(np.float32)
                linear.bias = nn.Parameter(torch.from_numpy(bias), requires_grad=False)
        values = np.ascontiguousarray(weight.astype(np.float32))
        if layer.precision.startswith("w"):
            values = self._compare(layer, values)
        # A new parameter, not an assignment into the old: an embedding table may share it.
        linear.weight = nn.Parameter(torch.from_numpy(values), requires_grad=False)

    def _compare(self, layer: DecoderLayer, weight: FloatArray) -> FloatArray:
        """Returns the graph's weight `[N,K]`, after comparing it with what it should be."""
        stored = self._read(layer.weight)
        if self._settings.recipe.algorithm != "rtn" and layer.precision.startswith("w4"):
            sizes = float(np.linalg.norm(weight)) * float(np.linalg.norm(stored))
            cosine = float(np.vdot(weight, stored)) / sizes if sizes else 1.0
            self.smallest_cosine = min(self.smallest_cosine, cosine)
        else:
            self.agreement.add(quantize_weight(weight, layer.precision, self._settings), stored)
        return stored

    def _read(self, codes: str) -> FloatArray:
        base = codes.removesuffix(".codes")
        values = self._array(codes).astype(np.float32)
        if f"{base}.steps" in self._stored:
            scales = self._array(f"{base}.multipliers").astype(np.float32) * self._array(f"{base}.steps")
        else:
            scales = self._array(f"{base}.scales")
        values *= np.repeat(scales, len(values) // len(scales), axis=0)
        return np.ascontiguousarray(values.T)

    def _array(self, name: str) -> npt.NDArray[Any]:
        tensor = self._stored[name].const_value
        if tensor is None:
            raise TypeError(f"initializer {name} has no tensor")
        return tensor.numpy()


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
    """Makes a layer's module see what the graph's layer sees: a rotated input, quantized to the graph's codes.

    Args:
        layer: The layer.
        settings: The recipe, with every choice made.
        steps: For each forward pass the graph's quantized input `[B,S,K]`, if it has one, and which tokens count.
        agreement: Counts how the codes compare.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        settings: Settings,
        steps: Iterator[tuple[FloatArray, IntArray]],
        agreement: Agreement,
    ) -> None:
        self._layer = layer
        self._settings = settings
        self._steps = steps
        self._agreement = agreement

    def before(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Forward pre-hook: rotates the input, compares its codes with the graph's and goes on with the graph's."""
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

    def after(self, _: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook: turns the output back into the model's own basis."""
        rotation = self._layer.rotation.output
        if rotation is None:
            return output
        return torch.from_numpy(rotation.undo(output.numpy()).astype(np.float32))
