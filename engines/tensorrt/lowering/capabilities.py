"""What a flavour of TensorRT has, as flags that the lowering reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """What a network may hold.

    Attributes:
        plugins: Whether the functions of `engines.tensorrt.functions` run as plugins; else scoring is inlined and
            quantized layers stay quantizers and dequantizers.
    """

    plugins: bool


# Quick plugins with kernels that are compiled ahead of time.
TENSORRT = Capabilities(plugins=True)

# Builds with no GPU, has no plugins.
TENSORRT_RTX = Capabilities(plugins=False)
