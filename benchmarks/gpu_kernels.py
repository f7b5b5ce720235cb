"""Checks the kernels of score and activations against the NumPy reference on fresh random data, and times them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import get_args

import numpy as np
import torch
from gpu_report import Check, Timing
from gpu_timing import Kernels, Launch, copy_bandwidth, sets_beyond_cache, time_launches

from qavp_export.engines.kernels import quantize, score
from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.numerics.rotation import block_rotation
from qavp_export.numerics.score import (
    hybrid_token_score,
    outlier_intensity,
    quantization_error,
    root_mean_square_normalize,
)
from qavp_export.numerics.two_level import quantize_two_level

GROUP = 128
TORCH_TYPES = MappingProxyType({"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32})
# Of a decoder step, a pruned prompt, a whole one, a long one.
TOKENS = (1, 136, 640, 2048)
# Tokens of a picture, channels.
PICTURE = (576, 4096)
BATCHES = (1, 64)
# Of the decoder's linear layers.
WIDTHS = (4096, 11008)
# Warps of the quantizer that are tried: its own choice first.
WARPS = (None, 4, 8, 16)
# What is checked: types, images, tokens, channels; types, tokens, channels.
SCORES = (("fp16", 2, 576, 4096), ("bf16", 3, 77, 1152), ("fp32", 1, 2880, 3584), ("fp16", 5, 1, 5120))
QUANTIZED = (("fp32", 136, 4096), ("fp16", 1, 11008), ("bf16", 7, 3584), ("fp32", 2048, 11008))


def kernel_specs(*, tune: bool) -> Iterator[KernelSpec]:
    """Yields every kernel that `KernelBench` checks and times."""
    for dtype, images, tokens, width in SCORES:
        for score_input in get_args(score.ScoreInput):
            tiling = score.default_tiling(images * tokens, width, score_input)
            yield score.token_sensitivity_spec(dtype, width, GROUP, score_input, tiling)
        yield score.mix_token_score_spec(tokens, 0.5)
    tokens, width = PICTURE
    for images in BATCHES:
        for tiling in _tilings(images, tune=tune):
            yield score.token_sensitivity_spec("fp16", width, GROUP, "raw", tiling)
    yield score.mix_token_score_spec(tokens, 0.5)
    for dtype, _, width in QUANTIZED:
        for rotate in (False, True):
            yield quantize.quantize_two_level_spec(dtype, width, GROUP, rotate)
    for width in WIDTHS:
        for warps in WARPS if tune else WARPS[:1]:
            yield quantize.quantize_two_level_spec("fp32", width, GROUP, rotate=True, num_warps=warps)


def _tilings(images: int, *, tune: bool) -> Sequence[score.SensitivityTiling]:
    default = score.default_tiling(images * PICTURE[0], PICTURE[1], "raw")
    return score.CANDIDATE_TILINGS if tune else [default]


class KernelBench:
    """Checks and times the kernels of score and activations on one GPU.

    Args:
        kernels: Compiles and loads them.
        seed: Of the random data.
        tune: Whether to time every tiling that a kernel offers.
    """

    def __init__(self, kernels: Kernels, seed: int, *, tune: bool) -> None:
        self._kernels = kernels
        self._random = torch.Generator("cuda").manual_seed(seed)
        self._tune = tune

    def check_scores(self) -> Iterator[Check]:
        """Compares scores, and what they are made of, with the reference."""
        for dtype, images, tokens, width in SCORES:
            for score_input in get_args(score.ScoreInput):
                yield self._check_score(dtype, images, tokens, width, score_input)

    def _check_score(self, dtype: str, images: int, tokens: int, width: int, score_input: score.ScoreInput) -> Check:
        features = self._features(dtype, images, tokens, width)
        semantic = torch.rand((images, tokens), generator=self._random, device="cuda")
        launches, outputs = self._score(features, semantic, dtype, score_input)
        for launch in launches:
            launch()
        error, outlier, scores = (tensor.cpu().numpy() for tensor in outputs)
        values = features.float().cpu().numpy()
        scored = root_mean_square_normalize(values) if score_input == "rms" else values
        wanted = quantization_error(scored, GROUP)
        span = outlier_intensity(scored)
        # The kernel's docstring says why.
        bound = 1e-5 * wanted + 1e-6 * np.linalg.norm(scored, axis=-1)
        excess = float((np.abs(error - wanted) / bound).max())
        spans = float((np.abs(outlier - span) / (span + 1e-30)).max())
        reference = hybrid_token_score(
            values, semantic.cpu().numpy(), group_size=GROUP, alpha=0.5, score_input=score_input
        )
        differs = float(np.abs(scores - reference).max())
        passed = excess <= 1 and spans <= (0 if score_input == "raw" else 2e-6) and differs <= 1e-3
        case = f"{images} x {tokens} x {width} {dtype} {score_input}"
        return Check("hybrid_token_score", case, passed, f"E {excess:.2g} of its bound, R {spans:.1e}, S {differs:.1e}")

    def time_scores(self) -> Iterator[Timing]:
        """Times one picture, and a batch that fills the GPU, whose bandwidth is compared with a copy's."""
        copied = copy_bandwidth()
        tokens, width = PICTURE
        for images in BATCHES:
            for tiling in _tilings(images, tune=self._tune):
                nbytes = images * tokens * width * 2
                launches = []
                kept = []
                for _ in range(sets_beyond_cache(nbytes)):
                    features = self._features("fp16", images, tokens, width)
                    semantic = torch.rand((images, tokens), generator=self._random, device="cuda")
                    pair, outputs = self._score(features, semantic, "fp16", "raw", tiling)
                    kept.append((features, semantic, outputs))
                    launches.append(pair)
                both = time_launches([launch for pair in launches for launch in pair]) * 2
                case = f"{images} x {tokens} x {width} fp16"
                name = f"hybrid_token_score {_tiling(tiling)}" if self._tune else "hybrid_token_score"
                if images == 1:
                    yield Timing(name, case, both, "microseconds", both, 6.0, at_most=True)
                else:
                    share = nbytes / (both * 1e-6) / copied
                    yield Timing(name, case, both, f"a copy's {copied / 1e12:.2f} TB/s", share, 0.8)
                    alone = time_launches([pair[0] for pair in launches])
                    yield Timing(f"{name}, E and R alone", case, alone, "", nbytes / (alone * 1e-6) / copied)

    def _score(
        self,
        features: torch.Tensor,
        semantic: torch.Tensor,
        dtype: str,
        score_input: score.ScoreInput,
        tiling: score.SensitivityTiling | None = None,
    ) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        images, tokens, width = features.shape
        rows = images * tokens
        tiling = tiling or score.default_tiling(rows, width, score_input)
        error, outlier, scores = (torch.full((images, tokens), math.nan, device="cuda") for _ in range(3))
        sensitivity = score.token_sensitivity_spec(dtype, width, GROUP, score_input, tiling)
        mix = score.mix_token_score_spec(tokens, 0.5)
        launches = [
            self._kernels.bind(
                sensitivity, score.token_sensitivity_grid(rows, tiling), [features, rows, error, outlier]
            ),
            self._kernels.bind(mix, score.mix_token_score_grid(images), [error, outlier, semantic, tokens, scores]),
        ]
        return launches, (error, outlier, scores)

    def _features(self, dtype: str, images: int, tokens: int, width: int) -> torch.Tensor:
        """Returns random features with a few loud channels, as vision projectors have them."""
        values = torch.randn((images, tokens, width), generator=self._random, device="cuda")
        values[..., :: width // 8] *= 20
        return values.to(TORCH_TYPES[dtype])

    def check_quantizers(self) -> Iterator[Check]:
        """Compares codes and steps with the reference: the same, but for what a rotation's rounding moves."""
        for dtype, tokens, width in QUANTIZED:
            for rotate in (False, True):
                yield self._check_quantizer(dtype, tokens, width, rotate=rotate)

    def _check_quantizer(self, dtype: str, tokens: int, width: int, *, rotate: bool) -> Check:
        x = self._features(dtype, 1, tokens, width)[0].contiguous()
        launch, (products, steps) = self._quantizer(x, dtype, rotate=rotate)
        launch()
        values = x.float().cpu().numpy()
        if rotate:
            values = block_rotation(width, GROUP).apply(values).astype(np.float32)
        wanted = quantize_two_level(values, GROUP)
        expected = wanted.codes.reshape(tokens, -1, GROUP).astype(np.int16) * wanted.multipliers[..., None]
        found = products.cpu().numpy().astype(np.int16)
        differing = float((found.reshape(expected.shape) != expected).mean())
        step = float((np.abs(steps.cpu().numpy() - wanted.steps) / wanted.steps).max())
        passed = differing <= 2e-3 and step <= 1e-6 if rotate else differing == 0 and step == 0
        case = f"{tokens} x {width} {dtype}{' rotated' if rotate else ''}"
        return Check("quantize_two_level", case, passed, f"{differing:.1e} of the products differ, steps {step:.1e}")

    def time_quantizers(self) -> Iterator[Timing]:
        """Times the quantizer at the decoder's widths, rotating."""
        for width in WIDTHS:
            for tokens in TOKENS:
                sets = [self._features("fp32", 1, tokens, width)[0] for _ in range(8)]
                for warps in WARPS if self._tune else WARPS[:1]:
                    bound = [self._quantizer(x, "fp32", rotate=True, warps=warps) for x in sets]
                    name = f"quantize_two_level {warps or 'default'}" if self._tune else "quantize_two_level"
                    time = time_launches([launch for launch, _ in bound])
                    yield Timing(name, f"{tokens} x {width} fp32 rotated", time)

    def _quantizer(
        self, x: torch.Tensor, dtype: str, *, rotate: bool, warps: int | None = None
    ) -> tuple[Launch, tuple[torch.Tensor, torch.Tensor]]:
        tokens, width = x.shape
        products = torch.full((tokens, width), 127, dtype=torch.int8, device="cuda")
        steps = torch.full((tokens,), math.nan, device="cuda")
        spec = quantize.quantize_two_level_spec(dtype, width, GROUP, rotate, warps)
        grid = quantize.quantize_two_level_grid(tokens)
        return self._kernels.bind(spec, grid, [x, products, steps]), (products, steps)


def _tiling(tiling: score.SensitivityTiling) -> str:
    return f"{tiling.tokens}/{tiling.lanes}/{tiling.num_warps}"
