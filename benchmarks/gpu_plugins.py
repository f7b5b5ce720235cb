"""Launches what the TensorRT plugins launch, as TensorRT would, and compares with the reference; needs no TensorRT."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from gpu_kernels import GROUP
from gpu_matmul import Layer
from gpu_report import Check

from qavp_export.engines.cuda.driver import Device, Stream
from qavp_export.engines.tensorrt.plugins.linear import QuantizeTwoLevel, W4A4MatMul
from qavp_export.engines.tensorrt.plugins.plugin import Compiler, Launch, Plugin, Setting, Tensor
from qavp_export.engines.tensorrt.plugins.score import MixTokenScore, TokenSensitivity
from qavp_export.engines.tensorrt.plugins.select import SelectDpp, SelectMaxmin, TokenCodes, TokenProducts
from qavp_export.numerics.diverse import Diversity, choose_diverse, code_width
from qavp_export.numerics.rotation import block_rotation
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.two_level import quantize_two_level

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.int8: "i8"}
_BATCH, _TOKENS, _WIDTH, _OUTPUTS, _KEPT = 2, 68, 4096, 1000, 31


class PluginBench:
    """Checks the plugins' kernels for one compute capability.

    Args:
        device: The GPU.
        capability: What kernels are compiled for: the GPU's own, or 80, which every GPU since Ampere runs.
        seed: Of the random data.
    """

    def __init__(self, device: Device, capability: int, seed: int) -> None:
        self._device = device
        self._compiler = Compiler(capability)
        self._random = torch.Generator("cuda").manual_seed(seed)
        self._stream: Stream = device.stream()

    def check(self) -> Iterator[Check]:
        """Compares every plugin, in every tactic, with the reference."""
        yield from self._check_score()
        for select in get_args(Diversity):
            yield from self._check_selection(select)
        yield from self._check_quantizer()
        yield from self._check_product(_TOKENS)
        yield from self._check_product(1)

    def _check_score(self) -> Iterator[Check]:
        features = torch.randn((_BATCH, _TOKENS, _WIDTH), generator=self._random, device="cuda")
        semantic = torch.rand((_BATCH, _TOKENS), generator=self._random, device="cuda")
        error, outlier, score = (torch.full((_BATCH, _TOKENS), math.nan, device="cuda") for _ in range(3))
        settings = {"group_size": GROUP, "rms": 0}
        for case in self._run(TokenSensitivity(), [features], settings, [error, outlier]):
            weights = {"alpha": 0.5, "outlier_weight": 0.5}
            for _ in self._run(MixTokenScore(), [error, outlier, semantic], weights, [score]):
                wanted = hybrid_token_score(features.cpu().numpy(), semantic.cpu().numpy(), group_size=GROUP)
                differs = float(np.abs(score.cpu().numpy() - wanted).max())
                yield Check("plugins of the score", case, differs <= 1e-4, f"S {differs:.1e}")

    def _check_selection(self, select: Diversity) -> Iterator[Check]:
        features = torch.randn((_BATCH, _TOKENS, _WIDTH), generator=self._random, device="cuda")
        score = torch.rand((_BATCH, _TOKENS), generator=self._random, device="cuda")
        codes = torch.full((_BATCH, _TOKENS, code_width(_WIDTH)), 127, dtype=torch.int8, device="cuda")
        products = torch.full((_BATCH, _TOKENS, _TOKENS), math.nan, device="cuda")
        indices, order = (torch.full((_BATCH, _KEPT), -1, dtype=torch.int32, device="cuda") for _ in range(2))
        plugin: Plugin = SelectMaxmin()
        inputs, outputs, settings = [products], [indices, order], {"kept": _KEPT}
        if select == "dpp":
            plugin, inputs = SelectDpp(), [products, score]
            *_, rows = plugin.shapes([products.shape, score.shape], settings)
            outputs.append(torch.full(rows, math.nan, device="cuda"))
        for _ in self._run(TokenCodes(), [features], {}, [codes]):
            pass
        for _ in self._run(TokenProducts(), [codes], {}, [products]):
            pass
        for case in self._run(plugin, inputs, settings, outputs):
            wanted = choose_diverse(select, features.cpu().numpy(), score.cpu().numpy(), _KEPT)
            wrong = int((order.cpu().numpy() != wanted).sum())
            unsorted = int((indices != order.sort(dim=-1).values).sum())
            yield Check(f"plugin {plugin.name}", case, wrong == unsorted == 0, f"{wrong} choices differ")

    def _check_quantizer(self) -> Iterator[Check]:
        x = torch.randn((_BATCH, _TOKENS, _WIDTH), generator=self._random, device="cuda")
        products = torch.full(x.shape, 127, dtype=torch.int8, device="cuda")
        steps = torch.full((_BATCH, _TOKENS, 1), math.nan, device="cuda")
        for rotate in (0, 1):
            settings = {"group_size": GROUP, "rotate": rotate}
            for case in self._run(QuantizeTwoLevel(), [x], settings, [products, steps]):
                values = x.cpu().numpy()
                if rotate:
                    values = block_rotation(_WIDTH, GROUP).apply(values).astype(np.float32)
                wanted = quantize_two_level(values, GROUP)
                expected = wanted.codes.reshape(*wanted.multipliers.shape, GROUP).astype(np.int16)
                expected *= wanted.multipliers[..., None]
                differing = float((products.cpu().numpy().reshape(expected.shape) != expected).mean())
                passed = differing <= 2e-3 * rotate
                yield Check(f"plugin {QuantizeTwoLevel.name}", f"{case} rotate {rotate}", passed, f"{differing:.1e}")

    def _check_product(self, tokens: int) -> Iterator[Check]:
        layer = Layer.draw(self._random, _BATCH * tokens, _WIDTH, _OUTPUTS, GROUP)
        wanted = layer.exact()
        y = torch.full((_BATCH, tokens, _OUTPUTS), math.nan, device="cuda")
        products, steps = layer.products.reshape(_BATCH, tokens, -1), layer.steps.reshape(_BATCH, tokens, 1)
        inputs = [products, steps, layer.weight, layer.multipliers, layer.scales]
        for case in self._run(W4A4MatMul(), inputs, {"group_size": GROUP}, [y]):
            wrong = int((y.reshape(wanted.shape) != wanted).sum())
            yield Check(f"plugin {W4A4MatMul.name}", f"{case} {tokens} tokens", wrong == 0, f"{wrong} outputs differ")
            y.fill_(math.nan)

    def _run(
        self,
        plugin: Plugin,
        inputs: Sequence[torch.Tensor],
        settings: Mapping[str, Setting],
        outputs: Sequence[torch.Tensor],
    ) -> Iterator[str]:
        """Runs a plugin in each of its tactics, and yields their names."""
        tensors = [_described(tensor) for tensor in inputs]
        for tactic in plugin.tactics(tensors, settings, self._compiler):
            launch = plugin.launch(tensors, settings, tactic, self._compiler, lambda a, b: -(-a // b))
            torch.cuda.synchronize()
            self._launch(launch, inputs, outputs)
            yield f"for {self._compiler.capability}, tactic {tactic}"

    def _launch(self, launch: Launch, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        kernel = launch.kernel
        function = self._device.load(kernel.ptx, kernel.name)
        pointers = [ctypes.c_uint64(tensor.data_ptr()) for tensor in (*inputs, *outputs)]
        arguments = [*pointers[: len(inputs)], *launch.scalars, *pointers[len(inputs) :]]
        function.launch(launch.grid, (32 * kernel.num_warps, 1, 1), arguments, kernel.shared_bytes, self._stream)
        self._stream.synchronize()


def _described(tensor: torch.Tensor) -> Tensor:
    sizes = tuple(tensor.shape)
    return Tensor(_NAMES[tensor.dtype], sizes, sizes, sizes, sizes)
