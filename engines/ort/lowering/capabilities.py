"""What a provider of ONNX Runtime runs fast, as flags that the lowering reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.engines.ort.plan import LEAST_PROMPT


@dataclass(frozen=True)
class Capabilities:
    """What integer products and attention look like on one provider.

    Attributes:
        activations: Type of the codes that enter integer products: UINT8 around a zero point of 128, or INT8.
        weights: Type of a weight's codes: INT8, or UINT8 around 128.
        fused_scales: Whether `MatMulIntegerToFloat` multiplies by the scales of output channels.
        cache: Type of keys and values in the cache.
        prompt_tiles: Tiles that a prompt's causal attention is computed in where query heads share keys, of at least
            one token each; 0: it is one operator.
        coded_caches: Whether attention over a cache of 8-bit codes, in float otherwise, is built as well.
        loops: Whether loops of small operators are fast. Where not, diverse tokens are chosen on the CPU.
    """

    activations: ir.DataType
    weights: ir.DataType
    fused_scales: bool
    cache: ir.DataType
    prompt_tiles: int
    coded_caches: bool
    loops: bool

    @property
    def attention(self) -> ir.DataType:
        """Returns the type that attention runs in."""
        return ir.DataType.FLOAT if self.cache == ir.DataType.INT8 else self.cache

    def with_codes(self) -> Capabilities:
        """Returns the same with a cache of 8-bit codes."""
        return dataclasses.replace(self, cache=ir.DataType.INT8)


CPU = Capabilities(
    ir.DataType.UINT8,
    ir.DataType.INT8,
    fused_scales=True,
    cache=ir.DataType.FLOAT,
    prompt_tiles=LEAST_PROMPT,
    coded_caches=True,
    loops=True,
)

# Before VNNI, x86 adds pairs of unsigned times signed products in 16 bits, which overflow; unsigned times unsigned is
# exact everywhere, at less than half the speed.
CPU_UNSIGNED = dataclasses.replace(CPU, weights=ir.DataType.UINT8)

# Its integer products take signed operands only, its attention 16-bit floats only. Each operator of a loop is a launch.
CUDA = Capabilities(
    ir.DataType.INT8,
    ir.DataType.INT8,
    fused_scales=False,
    cache=ir.DataType.FLOAT16,
    prompt_tiles=0,
    coded_caches=False,
    loops=False,
)
