"""What a release of TensorRT has, as flags that the lowering reads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qavp_export.engines.tensorrt.keys import TENSORRT as TENSORRT_FLAVOUR
from qavp_export.errors import UnavailableError

ATTENTION, CACHE_UPDATE = "Attention", "TensorScatter"
NORM, ROTARY = "RMSNormalization", "RotaryEmbedding"


@dataclass(frozen=True)
class Capabilities:
    """What a network may hold.

    Attributes:
        plugins: Whether the functions of `engines.tensorrt.functions` run as plugins; else scoring is inlined and
            quantized layers stay quantizers and dequantizers.
        operators: Those of ONNX's opsets 23 and 24 that the parser takes. Others are written out.
    """

    plugins: bool
    operators: frozenset[str] = frozenset({ATTENTION, CACHE_UPDATE, NORM, ROTARY})


# Quick plugins with kernels that are compiled ahead of time.
TENSORRT = Capabilities(plugins=True)
TENSORRT_10_14 = Capabilities(plugins=True, operators=frozenset({ATTENTION}))
TENSORRT_10_13 = Capabilities(plugins=True, operators=frozenset())

# Builds with no GPU, has no plugins.
TENSORRT_RTX = Capabilities(plugins=False)

# As the parser's changelog says. The Python bindings agree: layer types for attention are in those of 10.14, and for
# rotary embeddings and the cache update in those of 10.15.
_RELEASES = (((10, 15), TENSORRT), ((10, 14), TENSORRT_10_14), ((10, 13), TENSORRT_10_13))


def capabilities_of(flavour: str, version: str) -> Capabilities:
    """Returns what a release has.

    Args:
        flavour: `tensorrt` or `tensorrt-rtx`.
        version: The library's version, such as `10.13.3.9`.

    Raises:
        UnavailableError: It is older than what plugins are written for.
    """
    if flavour != TENSORRT_FLAVOUR:
        return TENSORRT_RTX
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    for release, capabilities in _RELEASES:
        if found >= release:
            return capabilities
    raise UnavailableError(f"TensorRT {version} is older than 10.13: install a newer one, such as 11")
