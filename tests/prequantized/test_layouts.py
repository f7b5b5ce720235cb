"""Every layout is read exactly: what other writers packed comes back bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor

from qavp_export.prequantized import integers
from tests.prequantized.checkpoints import awq_settings, compressed_settings, gptq_settings, read_weight
from tests.prequantized.packers import compress, draw, pack_awq, pack_gptq, scheme

# Rows and columns: what transposing or swapping the axes would change.
SHAPE = (24, 96)


def _equal(actual: Any, expected: Any) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


class TestGptq:
    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("act_order", [False, True])
    def test_reads_what_was_packed(
        self, tmp_path: Path, version: int, bits: int, symmetric: bool, act_order: bool
    ) -> None:
        # Version 1 cannot store a zero point of 0.
        q = draw(*SHAPE, bits=bits, group_size=32, symmetric=symmetric, act_order=act_order, lowest_zero=2 - version)
        settings = gptq_settings(
            bits=bits, sym=symmetric, desc_act=act_order, checkpoint_format="gptq" if version == 1 else "gptq_v2"
        )
        _equal(read_weight(tmp_path, settings, pack_gptq(q, version=version), SHAPE), q.weight())

    @pytest.mark.parametrize("group_size", [-1, 64, 96])
    @pytest.mark.parametrize("g_idx", [True, False])
    def test_group_sizes(self, tmp_path: Path, group_size: int, g_idx: bool) -> None:
        # 64 leaves a last group of 32 columns.
        q = draw(*SHAPE, bits=4, group_size=group_size, symmetric=False, lowest_zero=1)
        settings = gptq_settings(sym=False, group_size=group_size)
        _equal(read_weight(tmp_path, settings, pack_gptq(q, g_idx=g_idx), SHAPE), q.weight())

    def test_words_are_padded(self, tmp_path: Path) -> None:
        q = draw(13, 45, bits=4, group_size=32, symmetric=False, lowest_zero=1)
        _equal(read_weight(tmp_path, gptq_settings(sym=False), pack_gptq(q), (13, 45)), q.weight())

    def test_by_hand(self, tmp_path: Path) -> None:
        # Codes 1, 2, ... 8 from the lowest nibble up; the zero point 8 is stored as 7; scale 0.5.
        tensors = {
            "qweight": torch.tensor([[0x87654321 - 2**32]], dtype=torch.int32),
            "qzeros": torch.tensor([[0x7]], dtype=torch.int32),
            "scales": torch.tensor([[0.5]], dtype=torch.float16),
        }
        expected = [[-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]]
        _equal(read_weight(tmp_path, gptq_settings(sym=False, group_size=8), tensors, (1, 8)), expected)

    def test_symmetric_zero_points_of_either_version_in_version_1(self, tmp_path: Path) -> None:
        q = draw(*SHAPE, bits=4, group_size=32, symmetric=True)
        _equal(read_weight(tmp_path, gptq_settings(), pack_gptq(q, version=2), SHAPE), q.weight())

    def test_gptqmodel_subtracts_one_from_whole_words(self, tmp_path: Path) -> None:
        # Zero points 8, 0, 3 and five of 5: 0x55555308 - 0x11111111 borrows from the 3.
        q = draw(8, 32, bits=4, group_size=32, symmetric=True)
        q.zeros[:, 0] = [8, 0, 3, 5, 5, 5, 5, 5]
        tensors = pack_gptq(q, version=2)
        tensors["qzeros"] -= 0x11111111
        settings = gptq_settings(sym=False, meta={"quantizer": ["gptqmodel:1.4.0"]})
        _equal(read_weight(tmp_path, settings, tensors, (8, 32)), q.weight())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_scale_dtypes(self, tmp_path: Path, dtype: torch.dtype) -> None:
        q = draw(*SHAPE, bits=4, group_size=32, symmetric=True)
        tensors = pack_gptq(q)
        tensors["scales"] = torch.full_like(tensors["scales"], 0.25).to(dtype)
        expected = (q.codes - 8).astype(np.float32) * np.float32(0.25)
        _equal(read_weight(tmp_path, gptq_settings(), tensors, SHAPE), expected)

    def test_in_chunks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Seven rows at a time, three in the last chunk.
        monkeypatch.setattr(integers, "_CHUNK", 7 * 96 + 5)
        q = draw(*SHAPE, bits=8, group_size=32, symmetric=False, act_order=True, lowest_zero=1)
        settings = gptq_settings(bits=8, sym=False, desc_act=True)
        _equal(read_weight(tmp_path, settings, pack_gptq(q), SHAPE), q.weight())


class TestAwq:
    @pytest.mark.parametrize("group_size", [32, -1])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_reads_what_was_packed(self, tmp_path: Path, group_size: int, symmetric: bool) -> None:
        q = draw(*SHAPE, bits=4, group_size=group_size, symmetric=symmetric)
        settings = awq_settings(group_size=group_size, zero_point=not symmetric)
        _equal(read_weight(tmp_path, settings, pack_awq(q), SHAPE), q.weight())

    def test_by_hand(self, tmp_path: Path) -> None:
        # Output channels 0 to 7 have codes 0 to 7; nibbles from the highest down hold channels 7 5 3 1 6 4 2 0.
        tensors = {
            "qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
            "qzeros": torch.tensor([[0x00000009]], dtype=torch.int32),
            "scales": torch.full((1, 8), 2.0, dtype=torch.float16),
        }
        # Only channel 0 has a zero point, 9.
        expected = [[-18.0], [2.0], [4.0], [6.0], [8.0], [10.0], [12.0], [14.0]]
        _equal(read_weight(tmp_path, awq_settings(group_size=1), tensors, (8, 1)), expected)


class TestPackQuantized:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("group_size", [32, -1])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_reads_what_its_library_packed(self, tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
        # The library packs whole channels of any length; groups must divide a row.
        shape = SHAPE if group_size > 0 else (13, 45)
        q = draw(*shape, bits=bits, group_size=group_size, symmetric=symmetric)
        tensors = compress(q, "pack-quantized")
        strategy = {"strategy": "group", "group_size": 32} if group_size > 0 else CHANNEL
        settings = compressed_settings(weights={"num_bits": bits, "symmetric": symmetric} | strategy)
        actual = read_weight(tmp_path, settings, tensors, shape)
        _equal(actual, q.weight())
        library = BaseCompressor.get_value_from_registry("pack-quantized")
        floats = tensors | {"weight_scale": tensors["weight_scale"].float()}
        unpacked = library.decompress(floats, scheme(q, strategy["strategy"]))["weight"]
        _equal(actual, unpacked.numpy())

    @pytest.mark.parametrize("spelling", ["group", "dynamic", True])
    def test_activation_order(self, tmp_path: Path, spelling: str | bool) -> None:
        # Newer versions of the library lack this order; older ones wrote the same words, and an index.
        q = draw(*SHAPE, bits=4, group_size=32, symmetric=True, act_order=True)
        plain = draw(*SHAPE, bits=4, group_size=32, symmetric=True)
        assert (q.codes == plain.codes).all()
        tensors = compress(plain, "pack-quantized") | {"weight_g_idx": torch.from_numpy(q.groups.astype(np.int32))}
        _equal(read_weight(tmp_path, compressed_settings(weights={"actorder": spelling}), tensors, SHAPE), q.weight())

    @pytest.mark.parametrize("spelling", ["weight", "static", None, False])
    def test_an_index_of_minus_one_means_none(self, tmp_path: Path, spelling: str | bool | None) -> None:
        q = draw(*SHAPE, bits=4, group_size=32, symmetric=True)
        tensors = compress(q, "pack-quantized") | {"weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
        _equal(read_weight(tmp_path, compressed_settings(weights={"actorder": spelling}), tensors, SHAPE), q.weight())

    def test_by_hand(self, tmp_path: Path) -> None:
        # Codes -8, -7, ... -1 are stored plus 8, the first in the lowest nibble.
        tensors = {
            "weight_packed": torch.tensor([[0x76543210]], dtype=torch.int32),
            "weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
            "weight_shape": torch.tensor([1, 8]),
        }
        expected = [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]
        _equal(read_weight(tmp_path, compressed_settings(weights={"group_size": 8}), tensors, (1, 8)), expected)


CHANNEL: dict[str, Any] = {"strategy": "channel", "group_size": None}


class TestIntQuantized:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("stored", ["int-quantized", "naive-quantized"])
    def test_reads_what_its_library_packed(
        self, tmp_path: Path, bits: int, strategy: str, symmetric: bool, stored: str
    ) -> None:
        q = draw(*SHAPE, bits=bits, group_size=32 if strategy == "group" else -1, symmetric=symmetric)
        if strategy == "tensor":
            q.scales[:], q.zeros[:] = q.scales[0, 0], q.zeros[0, 0]
        tensors = compress(q, stored, strategy)
        group_size = 32 if strategy == "group" else None
        weights = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": group_size}
        _equal(read_weight(tmp_path, compressed_settings(stored, weights), tensors, SHAPE), q.weight())

    def test_by_hand(self, tmp_path: Path) -> None:
        tensors = {
            "weight": torch.tensor([[-128, 0, 127], [1, 2, 3]], dtype=torch.int8),
            "weight_scale": torch.tensor([[0.5], [4.0]], dtype=torch.bfloat16),
            "weight_zero_point": torch.tensor([[-1], [2]], dtype=torch.int8),
        }
        settings = compressed_settings("int-quantized", {"num_bits": 8, "symmetric": False} | CHANNEL)
        _equal(read_weight(tmp_path, settings, tensors, (2, 3)), [[-63.5, 0.5, 64.0], [-4.0, 0.0, 4.0]])
