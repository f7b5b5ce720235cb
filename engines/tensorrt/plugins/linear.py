"""The plugins that run two-level W4A4 linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qavp_export.engines.kernels.compile import CompiledKernel
from qavp_export.engines.kernels.matmul import w4a4_matmul_spec
from qavp_export.engines.kernels.quantize import quantize_two_level_spec
from qavp_export.engines.kernels.tilings import GemvTiling, Tiling, matmul_tiling
from qavp_export.engines.tensorrt.functions import QUANTIZE_TWO_LEVEL, W4A4_MATMUL
from qavp_export.engines.tensorrt.plugins.plugin import Compiler, Launch, Plugin, Setting, Tensor

# What a block may take without asking the driver for more, which nothing says that TensorRT does.
SHARED_BYTES = 48 * 1024


class QuantizeTwoLevel(Plugin):
    """`x [...,K]` -> `products [...,K]` INT8, `steps [...,1]`."""

    name = QUANTIZE_TWO_LEVEL
    inputs = ("x",)
    settings = MappingProxyType({"group_size": int, "rotate": int})
    outputs = ("INT8", "FLOAT")

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns the input's shape, and that with one channel."""
        del settings
        (x,) = inputs
        return [tuple(x), (*x[:-1], 1)]

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `quantize_two_level`."""
        del tactic, cdiv
        (x,) = inputs
        rotate = bool(settings["rotate"])
        spec = quantize_two_level_spec(x.dtype, x.size(-1), int(settings["group_size"]), rotate)
        return Launch(compiler(spec), (x.rows, 1, 1))


class W4A4MatMul(Plugin):
    """The function's inputs -> `y [...,N]`; a tactic is the token count that the tiling is made for."""

    name = W4A4_MATMUL
    inputs = ("products", "steps", "weight", "multipliers", "scale")
    settings = MappingProxyType({"group_size": int})
    outputs = ("FLOAT",)

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns the products' shape with the weight's output channels."""
        del settings
        products, _, weight, *_ = inputs
        return [(*products[:-1], weight[0])]

    def tactics(self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], compiler: Compiler) -> list[int]:
        """Returns the profile's usual token count, and its largest if that is better cut in another way."""
        del settings
        products, sizes = inputs[0], _sizes(inputs)
        counts = {products.usual_rows, products.most_rows}
        tilings = {matmul_tiling(tokens, *sizes, compiler.capability, one_launch=True): tokens for tokens in counts}
        return sorted(tilings.values())

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `w4a4_matmul`, or of `w4a4_gemv` for single tokens."""
        products, (_, outputs) = inputs[0], _sizes(inputs)
        tiling = matmul_tiling(tactic, *_sizes(inputs), compiler.capability, one_launch=True)
        kernel = _fitting(inputs, int(settings["group_size"]), tiling, compiler)
        rows = -(-outputs // tiling.outputs)
        if isinstance(tiling, GemvTiling):
            return Launch(kernel, (rows, products.rows, 1), (products.rows,))
        blocks = cdiv(products.rows, tiling.tokens + tiling.extra_tokens)
        return Launch(kernel, (blocks * rows, 1, 1), (products.rows,))


def _sizes(inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Returns K and N."""
    return inputs[0].size(-1), inputs[2].size(0)


def _fitting(inputs: Sequence[Tensor], group_size: int, tiling: Tiling, compiler: Compiler) -> CompiledKernel:
    """Compiles a tiling with as many tiles in flight as shared memory has room for."""
    sizes = _sizes(inputs)
    kernel = compiler(w4a4_matmul_spec(*sizes, group_size, tiling, dtype="fp32"))
    while kernel.shared_bytes > SHARED_BYTES and not isinstance(tiling, GemvTiling) and tiling.num_stages > 1:
        tiling = replace(tiling, num_stages=tiling.num_stages - 1)
        kernel = compiler(w4a4_matmul_spec(*sizes, group_size, tiling, dtype="fp32"))
    return kernel
