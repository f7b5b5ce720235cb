"""Checkpoints whose linear weights were quantized by another tool, read as the float32 weights they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from qavp_export.prequantized import awq, compressed_tensors, gptq
from qavp_export.prequantized.base import Layout, ModuleTensors, Part
from qavp_export.prequantized.config import option, unsupported

__all__ = ["Layout", "ModuleTensors", "Part", "find_layout", "quantization_settings"]

_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Layout | None]] = MappingProxyType(
    {
        "awq": awq.parse,
        "compressed-tensors": compressed_tensors.parse,
        "gptq": gptq.parse,
    }
)


def quantization_settings(config: Mapping[str, Any]) -> object | None:
    """Returns the `quantization_config` of config.json, else the one of its `text_config`; None without either."""
    text = config.get("text_config")
    settings: object | None = config.get("quantization_config")
    if settings is None and isinstance(text, dict):
        settings = text.get("quantization_config")
    return settings


def find_layout(config: Mapping[str, Any]) -> Layout | None:
    """Finds how a checkpoint stores quantized weights, from its configuration alone.

    Args:
        config: config.json as parsed; see `quantization_settings`.

    Returns:
        The layout; None if no weight is stored quantized.

    Raises:
        CheckpointError: The weights are quantized in a way that is not supported; the message names the setting.
    """
    settings = quantization_settings(config)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise unsupported(f"is a {type(settings).__name__} instead of an object")
    return _METHODS[option(settings, "quant_method", tuple(_METHODS))](settings)
