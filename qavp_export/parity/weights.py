"""Compares the weights of a decoder's graph with the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from qavp_export.engines import FloatArray
from qavp_export.parity.layers import Agreement, DecoderLayer, quantize_weight
from qavp_export.passes._parallel import cut_rows, run_blocks
from qavp_export.settings import Settings

# Of a weight and what GPTQ made of it, which may shrink it where its input is mostly noise; 0 for codes of another.
COSINE_4_BIT = 0.5
# Rounding to 8 bits turns a weight by less than 1 part in 1000.
COSINE_8_BIT = 0.999
# Random vectors that a weight is applied to where rotating it whole would take as long as the export.
_PROBES = 8
# The two codes of a byte, the first in its low half; as one number, so that a lookup moves both.
_CODES = np.stack([(np.arange(256) << shift).astype(np.int8) >> 4 for shift in (4, 0)], axis=-1).astype(np.float32)
_PAIRS = _CODES.view(np.uint64)[:, 0]
# Values that are compared at a time: bounds the float64 temporaries.
_BLOCK_VALUES = 1 << 18

ReadLayer = Callable[[DecoderLayer, nn.Linear], torch.Tensor]
"""Returns the checkpoint's weight of a layer `[N,K]`, of any float dtype."""


class WeightComparison:
    """Gives the layers of a Hugging Face decoder the graph's weights, each compared with the checkpoint's.

    A weight that is rounded to nearest has codes that `numerics/` gives too. Calibrated weights need not be near the
    checkpoint's, but point the same way.

    Args:
        model: The Hugging Face model. Norm gains that went into the graph's weights become ones.
        layers: The decoder's linear layers.
        settings: The recipe, with every choice made.
        graph: The decoder's graph.
        read: Reads the checkpoint's weight of a layer.
        whole: Whether weights are rotated as a whole and compared code by code where they are rounded to nearest; else
            what they make of a few random vectors is compared, which costs less than reading them.

    Attributes:
        agreement: How codes compare.
        smallest_cosine: Smallest cosine similarity of a weight, or of what it makes of the vectors.
        wrong: The layers whose weights are not the checkpoint's, with the reason.
    """

    def __init__(
        self, model: Any, layers: list[DecoderLayer], settings: Settings, graph: Path, read: ReadLayer, *, whole: bool
    ) -> None:
        self.agreement = Agreement()
        self.smallest_cosine = 1.0
        self.wrong: list[str] = []
        self._settings = settings
        self._stored = ir.load(graph).graph.initializers
        self._read_layer = read
        self._whole = whole
        self._compared: set[str] = set()
        self._gains: dict[str, FloatArray] = {}
        for name in {layer.gain for layer in layers if layer.gain is not None}:
            gain = model.get_parameter(name)
            self._gains[name] = gain.detach().float().numpy().copy()
            gain.data = torch.ones_like(gain)

    def take(self, layer: DecoderLayer, linear: nn.Linear) -> tuple[FloatArray, FloatArray | None]:
        """Returns the graph's weight `[N,K]` of a layer and its bias, rotated as the weight is.

        Args:
            layer: The layer.
            linear: Its module.
        """
        bias = None if linear.bias is None else linear.bias.detach().float().numpy()
        if bias is not None and layer.rotation.output is not None:
            bias = layer.rotation.output.apply(bias).astype(np.float32)
        if not layer.precision.startswith("w"):
            return np.concatenate([part for _, part in self._folded(layer, self._read_layer(layer, linear))]), bias
        stored = self._stored_weight(layer.weight)
        if layer.module not in self._compared:
            self._compared.add(layer.module)
            self._compare(layer, linear, stored)
        return stored, bias

    def _compare(self, layer: DecoderLayer, linear: nn.Linear, stored: FloatArray) -> None:
        weight, four_bit = self._read_layer(layer, linear), layer.precision.startswith("w4")
        if not self._whole:
            cosine = _cosine([self._probed(layer, weight, stored)])
        elif four_bit and self._settings.recipe.algorithm != "rtn":
            cosine = _cosine((part, stored[rows]) for rows, part in self._folded(layer, weight))
        else:
            for rows, part in self._folded(layer, weight):
                self.agreement.add(
                    quantize_weight(part, layer.precision, self._settings), np.ascontiguousarray(stored[rows])
                )
            return
        self.smallest_cosine = min(self.smallest_cosine, cosine)
        # `not x >= limit`, so that NaN fails.
        if not cosine >= (COSINE_4_BIT if four_bit else COSINE_8_BIT):
            self.wrong.append(f"the weight of {layer.module} has cosine {cosine:.2f} with the checkpoint's")

    def _folded(self, layer: DecoderLayer, weight: torch.Tensor) -> Iterator[tuple[slice, FloatArray]]:
        """Yields the checkpoint's weight, by rows, with everything folded in that the graph's has."""
        blocks = cut_rows(weight.shape, _BLOCK_VALUES)
        if layer.rotation.output is None:
            for rows in blocks:
                yield rows, self._fold_inputs(layer, weight[rows])
            return
        turned = np.empty(weight.shape, np.float32)
        run_blocks(lambda rows: np.copyto(turned[rows], self._fold_inputs(layer, weight[rows])), blocks)
        output = layer.rotation.output
        run_blocks(
            lambda columns: np.copyto(turned[:, columns], output.apply(turned[:, columns].T).T.astype(np.float32)),
            cut_rows(weight.T.shape, _BLOCK_VALUES),
        )
        for rows in blocks:
            yield rows, turned[rows]

    def _fold_inputs(self, layer: DecoderLayer, rows: torch.Tensor) -> FloatArray:
        values: npt.NDArray[np.float64] = rows.detach().double().numpy()
        if layer.gain is not None:
            values = values * self._gains[layer.gain]
        for rotation in layer.rotation.inputs:
            values = rotation.apply(values)
        return values.astype(np.float32)

    def _probed(self, layer: DecoderLayer, weight: torch.Tensor, stored: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Returns what the checkpoint's weight and the graph's make of random vectors, each in its basis `[8,N]`."""
        probes = np.random.default_rng(0).standard_normal((_PROBES, stored.shape[1]))
        scaled = probes if layer.gain is None else probes * self._gains[layer.gain]
        expected: FloatArray = scaled.astype(np.float32) @ weight.detach().float().numpy().T
        if layer.rotation.output is not None:
            expected = layer.rotation.output.apply(expected).astype(np.float32)
        for rotation in layer.rotation.inputs:
            probes = rotation.apply(probes)
        return expected, probes.astype(np.float32) @ stored.T

    def _stored_weight(self, codes: str) -> FloatArray:
        base = codes.removesuffix(".codes")
        if f"{base}.steps" in self._stored:
            scales = self._array(f"{base}.multipliers").astype(np.float32) * self._array(f"{base}.steps")
        else:
            scales = self._array(f"{base}.scales")
        packed = self._stored[codes].dtype == ir.DataType.INT4
        # One row for each group of input channels; a byte is one code, or two of them.
        stored = self._bytes(codes).reshape(len(scales), -1)
        values = np.empty(
            (len(scales), stored.shape[1] * (2 if packed else 1) // scales.shape[1], scales.shape[1]), np.float32
        )

        def dequantize(group: int) -> None:
            row = np.take(_PAIRS, stored[group]).view(np.float32) if packed else stored[group].view(np.int8)
            np.multiply(row.reshape(values.shape[1:]), scales[group], out=values[group])

        run_blocks(dequantize, range(len(scales)))
        # A view: products with it need no copy.
        return values.reshape(-1, scales.shape[1]).T

    def _bytes(self, name: str) -> npt.NDArray[np.uint8]:
        tensor = self._stored[name].const_value
        if tensor is None:
            raise TypeError(f"initializer {name} has no tensor")
        data = np.frombuffer(tensor.tobytes(), np.uint8)
        if isinstance(tensor, ir.ExternalTensor):
            # Else the mapped pages of all weights would stay.
            tensor.release()
        return data

    def _array(self, name: str) -> npt.NDArray[Any]:
        tensor = self._stored[name].const_value
        if tensor is None:
            raise TypeError(f"initializer {name} has no tensor")
        array: npt.NDArray[Any] = tensor.numpy().copy()
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        return array


def _cosine(pairs: Iterable[tuple[FloatArray, FloatArray]]) -> float:
    """Returns the cosine similarity of two weights that come in parts."""
    products = np.zeros(3)
    for one, other in pairs:
        b = np.ascontiguousarray(other)
        products += [np.vdot(one, b), np.vdot(one, one), np.vdot(b, b)]
    return float(products[0] / np.sqrt(products[1] * products[2])) if products[1] and products[2] else 1.0
