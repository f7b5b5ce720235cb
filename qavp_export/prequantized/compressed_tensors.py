"""The integer layouts of compressed-tensors, which llm-compressor writes (`compressed_tensors/compressors/`).

`pack-quantized`, codes and zero points plus 2^(bits - 1) in 32-bit words, the first in the lowest bits:

    weight_packed      int32 [N, K * bits / 32]
    weight_scale       float [N, K / G], or [N, 1] for whole channels
    weight_zero_point  int32 [N * bits / 32, K / G], only if asymmetric: packed along the output channels
    weight_shape       int64 [2]: N, K
    weight_g_idx       int32 [K], only with activation order `group`: the group of each input channel

`int-quantized` and `naive-quantized`, codes in bytes:

    weight             int8 [N, K]
    weight_scale       float [N, K / G], [N, 1] or [1]
    weight_zero_point  int8, like the scale, only if asymmetric

`W[n, k] = (q[n, k] - z[n, g]) * s[n, g]`, codes and zero points in [-2^(bits - 1), 2^(bits - 1) - 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qavp_export.prequantized.base import INDEX_DTYPES, PACKED_DTYPES, SCALE_DTYPES, Layout, ModuleTensors, Part
from qavp_export.prequantized.config import group_size, option, refuse, unsupported
from qavp_export.prequantized.integers import FloatArray, IntArray, dequantize, unpack, words
from qavp_export.safetensors_index import shown

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "dense")


def parse(config: Mapping[str, Any]) -> Layout | None:
    """Returns the layout that a `quantization_config` of method `compressed-tensors` describes.

    Returns:
        None if the weights are stored as floats.

    Raises:
        CheckpointError: A setting is not supported.
    """
    refuse(config, "transform_config", "the model computes transforms that its weights alone do not show")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict):
        raise unsupported("has a sparsity_config that is not an object")
    option(sparsity, "format", ("dense",), "dense")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise unsupported("has no config_groups that say how the weights are quantized")
    formats = {name: _format(config, group) for name, group in groups.items() if group.get("weights") is not None}
    schemes = [_scheme(stored, groups[name]["weights"]) for name, stored in formats.items() if stored != "dense"]
    if not schemes:
        return None
    if any(scheme != schemes[0] for scheme in schemes):
        raise unsupported("has config_groups that quantize weights in different ways: they must all be quantized alike")
    return schemes[0].layout(_activations(config, groups))


@dataclass(frozen=True)
class _Scheme:
    """How one group of modules stores its weights."""

    format: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    act_order: bool

    def layout(self, activations: str | None) -> Layout:
        common = (self.bits, self.group_size, self.symmetric, activations)
        if self.format == "pack-quantized":
            return PackQuantized(*common, act_order=self.act_order)
        return IntQuantized(*common, per_tensor=self.strategy == "tensor")


def _format(config: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    return option(config if group.get("format") is None else group, "format", _FORMATS)


def _scheme(stored: str, weights: object) -> _Scheme:
    if not isinstance(weights, dict):
        raise unsupported("has config_groups whose weights are not an object")
    option(weights, "type", ("int",), "int")
    option(weights, "dynamic", (False,), False)
    strategies = ("group", "channel") if stored == "pack-quantized" else ("group", "channel", "tensor")
    strategy = option(weights, "strategy", strategies)
    # True is the oldest spelling, static and dynamic are aliases.
    order = option(weights, "actorder", ("group", "dynamic", True, "weight", "static", False), False)
    act_order = order in ("group", "dynamic", True)
    if act_order and (stored != "pack-quantized" or strategy != "group"):
        raise unsupported(f"has actorder {order}, which is supported only for format pack-quantized in groups")
    return _Scheme(
        format=stored,
        bits=option(weights, "num_bits", (4, 8)),
        symmetric=option(weights, "symmetric", (True, False), True),
        strategy=strategy,
        group_size=group_size(weights) if strategy == "group" else -1,
        act_order=act_order,
    )


def _activations(config: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns what a configuration says of activations, in words."""
    settings = {
        "inputs": [group.get("input_activations") for group in groups.values()],
        "outputs": [group.get("output_activations") for group in groups.values()],
        "KV cache": [config.get("kv_cache_scheme")],
    }
    found = {f"{what} {_in_words(args)}": None for what, entries in settings.items() for args in entries if args}
    return "; ".join(found) or None


def _in_words(args: object) -> str:
    if not isinstance(args, dict):
        return "quantized"
    kind = shown(f"{args.get('type', 'int')}{args.get('num_bits', 8)}")
    scope = f"per {shown(str(args['strategy']))}" if args.get("strategy") else "per tensor"
    return f"{kind} {scope}, {'dynamic' if args.get('dynamic') else 'static'}"


@dataclass(frozen=True)
class PackQuantized(Layout):
    """Format `pack-quantized`.

    Attributes:
        act_order: Whether a module's groups are not runs of neighbours, so that it must have `weight_g_idx`.
    """

    act_order: bool
    method: ClassVar[str] = "compressed-tensors"
    own_parts: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )

    def _parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = self._group_count(columns)
        parts = {
            "weight_packed": Part((rows, words(columns, self.bits)), PACKED_DTYPES),
            "weight_scale": Part((rows, groups), SCALE_DTYPES),
            "weight_shape": Part((2,), INDEX_DTYPES),
            "weight_g_idx": Part((columns,), INDEX_DTYPES),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part((words(rows, self.bits), groups), PACKED_DTYPES)
        return parts

    def _optional(self) -> tuple[str, ...]:
        return () if self.act_order else ("weight_g_idx",)

    def _read(self, tensors: ModuleTensors, rows: int, columns: int) -> FloatArray:
        shape = tensors.read("weight_shape").tolist()
        if shape != [rows, columns]:
            raise tensors.damaged("weight_shape", f"says {shape}, expected {[rows, columns]}")
        scales = tensors.scales("weight_scale", (rows, self._group_count(columns)))
        zeros = np.full(scales.shape, 2 ** (self.bits - 1), np.int16)
        if not self.symmetric:
            zeros[...] = unpack(tensors.read("weight_zero_point"), self.bits, 0)[:rows]
        groups = self._channel_groups(tensors, columns)
        return dequantize(unpack(tensors.read("weight_packed"), self.bits, 1)[:, :columns], zeros, scales, groups)

    def _channel_groups(self, tensors: ModuleTensors, columns: int) -> IntArray:
        # Without activation order some versions wrote an index of -1 for every channel.
        if not tensors.has("weight_g_idx") or (tensors.read("weight_g_idx") == -1).all():
            return self._consecutive(columns)
        return tensors.groups("weight_g_idx", self._group_count(columns))


@dataclass(frozen=True)
class IntQuantized(Layout):
    """Formats `int-quantized` and `naive-quantized`.

    Attributes:
        per_tensor: Whether the whole weight has one scale.
    """

    per_tensor: bool
    method: ClassVar[str] = "compressed-tensors"
    own_parts: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_zero_point")
    weight_dtype: ClassVar[str | None] = "I8"

    def _parts(self, rows: int, columns: int) -> dict[str, Part]:
        scales = (1,) if self.per_tensor else (rows, self._group_count(columns))
        parts = {"weight": Part((rows, columns), ("I8",)), "weight_scale": Part(scales, SCALE_DTYPES)}
        if not self.symmetric:
            parts["weight_zero_point"] = Part(scales, ("I8",))
        return parts

    def _read(self, tensors: ModuleTensors, rows: int, columns: int) -> FloatArray:
        stored = self._parts(rows, columns)["weight_scale"].shape
        grid = (rows, self._group_count(columns))
        scales = np.broadcast_to(tensors.scales("weight_scale", stored), grid)
        zeros = np.zeros(grid, np.int16)
        if not self.symmetric:
            zeros[...] = self._in_range(tensors, "weight_zero_point")
        return dequantize(self._in_range(tensors, "weight"), zeros, scales, self._consecutive(columns))

    def _in_range(self, tensors: ModuleTensors, part: str) -> IntArray:
        codes: IntArray = tensors.read(part)
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        lowest, highest = int(codes.min(initial=0)), int(codes.max(initial=0))
        if lowest < low or highest > high:
            raise tensors.damaged(
                part, f"has values from {lowest} to {highest}, outside {low}..{high} of {self.bits} bits"
            )
        return codes
