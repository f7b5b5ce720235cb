"""Rounds the decoder's weights by GPTQ, layer by layer, on what the engine will see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from qavp_export.calibration.rounded import RoundedWeights
from qavp_export.calibration.stops import Stop, find_stops, weight_of
from qavp_export.calibration.walk import Walk
from qavp_export.numerics.gptq import GptqSettings, gptq_one_level, gptq_two_level
from qavp_export.passes import Scheme
from qavp_export.passes._linear import input_of
from qavp_export.passes.quantizer import relative_error, squared_error, take_rows

Float32 = npt.NDArray[np.float32]


class GptqCalibration:
    """Rounds weights one input after the other: each layer is calibrated on what the rounded layers before it yield.

    Args:
        quantized: The decoder with its quantizers in place; `weights` writes into its file.
        walk: A walk over it.
        original: The decoder before that, with float weights and activations.
        original_walk: A walk over it, on the same prompts: what each layer should have seen.
        weights: Takes the rounded weights; those that it holds already are left as they are.
        group_size: Channels that share a scale.
        settings: Damping and order.
        folder: A folder for the matrices that are in use.
    """

    def __init__(
        self,
        quantized: ir.Model,
        walk: Walk,
        original: ir.Model,
        original_walk: Walk,
        weights: RoundedWeights,
        group_size: int,
        settings: GptqSettings,
        folder: Path,
    ) -> None:
        self._quantized = quantized
        self._walk = walk
        self._originals = {str(node.name): node for node in original.graph}
        self._original_walk = original_walk
        self._weights = weights
        self._group_size = group_size
        self._settings = settings
        self._folder = folder

    def run(self, schemes: Mapping[str, Scheme], progress: Callable[[int, int], None]) -> None:
        """Rounds the weights of layers with 4-bit weights.

        Args:
            schemes: The scheme of each of them by node name.
            progress: Called with layers done and layers in all.

        Raises:
            CalibrationError: The model overflows on the calibration prompts.
        """
        done = 0
        for stop in find_stops(self._quantized, schemes):
            progress(done, len(schemes))
            done += len(stop.nodes)
            originals = [self._originals[str(node.name)] for node in stop.nodes]
            if all(self._weights.holds(weight_of(node)) for node in originals):
                continue
            source = input_of(originals[0], 0)
            self._walk.advance([stop.value])
            self._original_walk.advance([source])
            hessian, cross = self._correlations(stop, source)
            self._round(originals, schemes[str(stop.nodes[0].name)], hessian, cross)
        progress(done, len(schemes))

    def _correlations(self, stop: Stop, source: ir.Value) -> tuple[Float32, Float32]:
        """Returns `sum xq^T xq` and `sum xf^T xq` over all tokens, `[K, K]`."""
        hessian: torch.Tensor | None = None
        cross: torch.Tensor | None = None
        for seen, meant in zip(self._walk.read(stop.value), self._original_walk.read(source), strict=True):
            quantized, original = (torch.from_numpy(x.reshape(-1, x.shape[-1])) for x in (seen, meant))
            if hessian is None or cross is None:
                hessian, cross = (torch.zeros(x.shape[-1], x.shape[-1]) for x in (seen, meant))
            # In place: a product of its own would be as large as the Hessian.
            hessian.addmm_(quantized.T, quantized)
            cross.addmm_(original.T, quantized)
        if hessian is None or cross is None:
            raise ValueError("there is no calibration prompt")
        return self._mapped("hessian", hessian), self._mapped("cross", cross)

    def _mapped(self, name: str, matrix: torch.Tensor) -> Float32:
        """Moves a matrix to disk: rounding needs a factor of the same size in memory."""
        file = self._folder / f"{name}.npy"
        np.save(file, matrix.numpy())
        mapped: Float32 = np.load(file, mmap_mode="r")
        return mapped

    def _round(self, nodes: list[ir.Node], scheme: Scheme, hessian: Float32, cross: Float32) -> None:
        values = [self._original_walk.weight(input_of(node, 1)) for node in nodes]
        # Layers with one input share the Hessian, so that it is factorized once.
        stacked = np.concatenate(values) if len(values) > 1 else values[0]
        rounding = gptq_two_level if scheme.scales == "two-level" else gptq_one_level
        # BLAS threads would wait for one another at every channel.
        with threadpool_limits(1):
            result = rounding(stacked, hessian, self._group_size, cross=cross, settings=self._settings)
        start = 0
        for node, value in zip(nodes, values, strict=True):
            part = take_rows(result, slice(start, start + len(value)))
            error = relative_error(squared_error(value, part), float(np.vdot(value, value)))
            self._weights.put(weight_of(node), part, error)
            start += len(value)
            # While the weight is in memory.
            self._original_walk.multiply(node)
