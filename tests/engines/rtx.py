"""What tests build with TensorRT-RTX, which needs no GPU, and what they expect of it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from qavp_export.engines.tensorrt.keys import TENSORRT_RTX, EngineKeys, check_files
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.manifest import Manifest

IS_PUBLISHED = sys.platform == "linux" and platform.machine() == "x86_64"
requires_rtx = pytest.mark.skipif(not IS_PUBLISHED, reason="TensorRT-RTX is published for Linux x86_64 only")

CAPABILITIES = (80, 86, 89, 120)
# One engine serves them all.
RTX = EngineTargets((TENSORRT_RTX,), CAPABILITIES) if IS_PUBLISHED else EngineTargets()

# What TensorRT-RTX 1.7 runs layers in, by their precision in the canonical graph.
REALIZED = {
    "w4a4": "int4 x float32",
    "w4a8": "int4 x float32",
    "w4a16": "int4 x float32",
    "w8a8": "int8 x float32",
    "w8a16": "float16 x float16",
    "float16": "float16 x float16",
    "bfloat16": "bfloat16 x bfloat16",
    "float32": "float32 x float32",
    "nvfp4": "fp4 x fp4",
}


def check_engines(manifest: Manifest, bundle: Path) -> None:
    """Fails if an engine of the default targets is missing, or runs a layer of the decoder in anything unexpected."""
    if not IS_PUBLISHED:
        return
    keys = EngineKeys.read(bundle, TENSORRT_RTX)
    check_files(keys, bundle)
    assert keys.capabilities == CAPABILITIES
    assert list(keys.graphs) == ["vision_encoder", "embedding", "decoder"]
    decoder = keys.graphs["decoder"]
    linears = {
        layer.removeprefix("decoder:"): precision
        for layer, precision in manifest.precision.items()
        if layer.startswith("decoder:")
    }
    attention = decoder.requested.keys() - linears.keys()
    assert len(attention) == manifest.decoder.num_layers
    assert {decoder.realized[layer] for layer in attention} == {"float16"}
    for layer, precision in linears.items():
        assert (decoder.requested[layer], decoder.realized[layer]) == (precision, REALIZED[precision]), layer
    assert set(keys.graphs["vision_encoder"].realized.values()) <= {"float16", "float16 x float16"}
    cached = {f"{kind}.{layer}" for layer in range(manifest.decoder.num_layers) for kind in ("past_key_values",)}
    assert {name.rsplit(".", 1)[0] for name in decoder.inputs if name.startswith("past_key_values.")} == cached
    described = manifest.engines[TENSORRT_RTX]
    assert described["layers"]["decoder"] == {
        layer: [decoder.requested[layer], realized] for layer, realized in decoder.realized.items()
    }
