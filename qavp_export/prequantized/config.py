"""Reads a `quantization_config`: untrusted JSON, of which every setting that matters must be a known one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from qavp_export.errors import CheckpointError
from qavp_export.safetensors_index import shown

T = TypeVar("T")


def unsupported(finding: str) -> CheckpointError:
    """Returns the error for a `quantization_config` that `finding`, for example `has bits 3, ...`."""
    return CheckpointError(
        f"quantization_config in config.json {finding}; quantize the model in a way that is supported, "
        "or use its original checkpoint"
    )


def option(config: Mapping[str, Any], key: str, supported: tuple[T, ...], default: T | None = None) -> T:
    """Returns one setting; the case of strings does not matter.

    Args:
        config: The settings.
        key: The setting's name.
        supported: The values that it may have.
        default: What an absent or null setting means; without it, the setting must be there.

    Raises:
        CheckpointError: The setting is absent, or has another value or type.
    """
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, str):
        value = value.lower()
    for candidate in supported:
        if type(value) is type(candidate) and value == candidate:  # type(): True == 1
            return candidate
    values = ", ".join(map(_json, supported))
    found = f"has no {key}" if value is None else f"has {key} {_json(value)}, which is not supported"
    raise unsupported(f"{found} (supported: {values})")


def group_size(config: Mapping[str, Any]) -> int:
    """Returns `group_size`: input channels that share a scale, or -1 for all of them.

    Raises:
        CheckpointError: It is absent, or neither positive nor -1.
    """
    value = config.get("group_size")
    if type(value) is not int or (value < 1 and value != -1):
        raise unsupported(f"has group_size {_json(value)}, but it must be a positive number, or -1 for whole channels")
    return value


def refuse(config: Mapping[str, Any], key: str, reason: str) -> None:
    """Raises CheckpointError if a setting is there and not null, false or empty."""
    if config.get(key):
        raise unsupported(f"has {key}, which is not supported: {reason}")


def refuse_overrides(config: Mapping[str, Any]) -> None:
    """Refuses GPTQModel's `dynamic` where it quantizes some modules in another way than the rest.

    A pattern that starts with `-:` leaves modules unquantized: their tensors are floats, which show that by themselves.

    Raises:
        CheckpointError: A pattern changes a setting.
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise unsupported("has a dynamic that is not an object")
    for pattern, settings in dynamic.items():
        if pattern.startswith("-:"):
            continue
        if not isinstance(settings, dict):
            raise unsupported(f"has dynamic {shown(pattern)}, which is not an object")
        changed = [key for key, value in settings.items() if value != config.get(key)]
        if changed:
            raise unsupported(
                f"has dynamic {shown(pattern)}, which changes {shown(changed[0])} for some modules: "
                "all quantized modules must be quantized alike"
            )


def _json(value: object) -> str:
    return shown(json.dumps(value))
