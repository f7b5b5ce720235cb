"""Quantized weights are untrusted input: whatever is wrong with a tensor is one clear line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qavp_export.errors import CheckpointError
from tests.prequantized.checkpoints import awq_settings, compressed_settings, gptq_settings, read_weight
from tests.prequantized.packers import Tensors, compress, draw, pack_awq, pack_gptq

SHAPE = (16, 64)
Damage = Callable[[Tensors], Tensors]


def _gptq(act_order: bool = False, symmetric: bool = True) -> tuple[dict[str, Any], Tensors]:
    q = draw(*SHAPE, bits=4, group_size=32, symmetric=symmetric, act_order=act_order, lowest_zero=1)
    return gptq_settings(sym=symmetric, desc_act=act_order), pack_gptq(q)


def _awq(symmetric: bool = False) -> tuple[dict[str, Any], Tensors]:
    q = draw(*SHAPE, bits=4, group_size=32, symmetric=symmetric)
    return awq_settings(zero_point=not symmetric), pack_awq(q)


def _packed(symmetric: bool = True, **weights: Any) -> tuple[dict[str, Any], Tensors]:
    q = draw(*SHAPE, bits=4, group_size=32, symmetric=symmetric)
    return compressed_settings(weights={"symmetric": symmetric} | weights), compress(q, "pack-quantized")


def _bytes(bits: int = 4, symmetric: bool = True) -> tuple[dict[str, Any], Tensors]:
    q = draw(*SHAPE, bits=bits, group_size=32, symmetric=symmetric)
    weights = {"num_bits": bits, "symmetric": symmetric}
    return compressed_settings("int-quantized", weights), compress(q, "int-quantized")


def _drop(part: str) -> Damage:
    return lambda tensors: {name: value for name, value in tensors.items() if name != part}


def _cut(part: str, axis: int = 0) -> Damage:
    return lambda tensors: tensors | {part: tensors[part].narrow(axis, 0, tensors[part].shape[axis] - 1)}


def _cast(part: str, dtype: torch.dtype) -> Damage:
    return lambda tensors: tensors | {part: tensors[part].to(dtype)}


def _put(part: str, value: float, index: tuple[int, ...] = (-1,)) -> Damage:
    def damage(tensors: Tensors) -> Tensors:
        changed = tensors[part].clone()
        changed[index] = value
        return tensors | {part: changed}

    return damage


DAMAGED = {
    "gptq without qweight": (_gptq(), _drop("qweight"), "1 tensor missing (layer.qweight)"),
    "gptq without scales": (_gptq(), _drop("scales"), "1 tensor missing (layer.scales)"),
    "gptq without zero points": (_gptq(), _drop("qzeros"), "1 tensor missing (layer.qzeros)"),
    "gptq without act order": (_gptq(act_order=True), _drop("g_idx"), "1 tensor missing (layer.g_idx)"),
    "gptq qweight cut": (_gptq(), _cut("qweight"), "layer.qweight in model.safetensors has shape (7, 16), expected"),
    "gptq scales cut": (_gptq(), _cut("scales", 1), "layer.scales in model.safetensors has shape (2, 15)"),
    "gptq zero points cut": (_gptq(), _cut("qzeros"), "layer.qzeros in model.safetensors has shape (1, 2)"),
    "gptq g_idx cut": (_gptq(), _cut("g_idx"), "layer.g_idx in model.safetensors has shape (63,), expected (64,)"),
    "gptq flat": (_gptq(), lambda t: t | {"qweight": t["qweight"].flatten()}, "has shape (128,), expected (8, 16)"),
    "gptq qweight of floats": (
        _gptq(), _cast("qweight", torch.float32), "layer.qweight in model.safetensors is stored as F32, expected I32"
    ),
    "gptq qweight of 64 bits": (_gptq(), _cast("qweight", torch.int64), "is stored as I64, expected I32"),
    "gptq scales of integers": (_gptq(), _cast("scales", torch.int32), "stored as I32, expected F16 or BF16 or F32"),
    "gptq scales of float64": (_gptq(), _cast("scales", torch.float64), "stored as F64, expected F16 or BF16 or F32"),
    "gptq g_idx of floats": (_gptq(), _cast("g_idx", torch.float32), "is stored as F32, expected I32 or I64"),
    "gptq g_idx too large": (
        _gptq(act_order=True), _put("g_idx", 2, (5,)), "has group 2 at index 5, outside 0..1; the weights are damaged"
    ),
    "gptq g_idx negative": (_gptq(), _put("g_idx", -1, (0,)), "has group -1 at index 0, outside 0..1"),
    "gptq g_idx far away": (
        (_gptq()[0], _cast("g_idx", torch.int64)(_gptq()[1])), _put("g_idx", 2**40, (1,)), "has group 1099511627776"
    ),
    "gptq scale NaN": (
        _gptq(), _put("scales", float("nan"), (1, 3)), "has 1 NaN or infinite value, the first at index (1, 3)"
    ),
    "gptq scale infinite": (_gptq(), _put("scales", float("inf"), (0, 0)), "has 1 NaN or infinite value"),
    "gptq scale makes infinite weights": (
        (_gptq()[0], _cast("scales", torch.float32)(_gptq()[1])), _put("scales", 1e38, (0, 0)), "has a scale beyond"
    ),
    "gptq symmetric with another zero point": (
        _gptq(), _put("qzeros", 0x77777778, (0, 0)), "has zero points other than 8, though sym is true"
    ),
    "gptq zero point 0 in version 1": (
        _gptq(symmetric=False), _put("qzeros", -1, (0, 0)), "has zero point 16, outside 0..15 (version 1 of the format"
    ),
    "awq without zero points": (_awq(), _drop("qzeros"), "1 tensor missing (layer.qzeros)"),
    "awq as gptq would": (
        (_awq()[0], _gptq()[1]), lambda t: t, "layer.qweight in model.safetensors has shape (8, 16), expected (64, 2)"
    ),
    "awq zero points of bytes": (_awq(), _cast("qzeros", torch.int8), "is stored as I8, expected I32"),
    "awq scale NaN": (_awq(), _put("scales", float("nan"), (0, 2)), "NaN or infinite value, the first at index (0, 2)"),
    "awq symmetric with another zero point": (
        _awq(symmetric=True), _put("qzeros", 0, (0, 0)), "has zero points other than 8, though zero_point is false"
    ),
    "packed without scale": (_packed(), _drop("weight_scale"), "1 tensor missing (layer.weight_scale)"),
    "packed without shape": (_packed(), _drop("weight_shape"), "1 tensor missing (layer.weight_shape)"),
    "packed without zero points": (
        _packed(symmetric=False), _drop("weight_zero_point"), "1 tensor missing (layer.weight_zero_point)"
    ),
    "packed without act order": (_packed(actorder="group"), lambda t: t, "1 tensor missing (layer.weight_g_idx)"),
    "packed without index": (_packed(actorder="dynamic"), lambda t: t, "1 tensor missing (layer.weight_g_idx)"),
    "packed with another shape": (_packed(), _put("weight_shape", 63), "says [16, 63], expected [16, 64]"),
    "packed cut": (_packed(), _cut("weight_packed", 1), "has shape (16, 7), expected (16, 8)"),
    "packed zero points not packed": (
        _packed(symmetric=False),
        lambda t: t | {"weight_zero_point": torch.zeros(16, 2, dtype=torch.int8)},
        "layer.weight_zero_point in model.safetensors has shape (16, 2), expected (2, 2)",
    ),
    "packed scale NaN": (_packed(), _put("weight_scale", float("nan"), (3, 1)), "the first at index (3, 1)"),
    "packed index too large": (
        _packed(),
        lambda t: t | {"weight_g_idx": torch.full((64,), 7, dtype=torch.int32)},
        "layer.weight_g_idx in",
    ),
    "bytes that are floats": (
        _bytes(), _cast("weight", torch.float16), "layer.weight in model.safetensors is stored as F16, expected I8"
    ),
    "bytes beyond 4 bits": (_bytes(), _put("weight", 8, (0, 0)), "to 8, outside -8..7 of 4 bits"),
    "zero point beyond 4 bits": (
        _bytes(symmetric=False), _put("weight_zero_point", -9, (0, 0)), "has values from -9 to"
    ),
    "bytes without scale": (_bytes(), _drop("weight_scale"), "1 tensor missing (layer.weight_scale)"),
    "bytes scale of another granularity": (_bytes(), _cut("weight_scale", 1), "has shape (16, 1), expected (16, 2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tensors(tmp_path: Path, name: str) -> None:
    (settings, tensors), damage, expected = DAMAGED[name]
    with pytest.raises(CheckpointError) as caught:
        read_weight(tmp_path, settings, damage(tensors), SHAPE)
    message = str(caught.value)
    assert expected in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_only_matrices(tmp_path: Path) -> None:
    settings, tensors = _gptq()
    with pytest.raises(CheckpointError, match=r"module layer in .* its weight has shape \(16, 8, 8\): only matrices"):
        read_weight(tmp_path, settings, tensors, (16, 8, 8))


def test_negative_scales_are_read(tmp_path: Path) -> None:
    # AutoRound chooses the sign that puts -8 at the wider side of a group.
    settings, tensors = _packed()
    positive = read_weight(tmp_path, settings, tensors, SHAPE)
    negative = read_weight(tmp_path, settings, tensors | {"weight_scale": -tensors["weight_scale"]}, SHAPE)
    assert (negative == -positive).all()
