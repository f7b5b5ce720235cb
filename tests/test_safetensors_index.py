"""Safetensors headers and indexes: every way in which untrusted ones can be wrong, in one clear line."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qavp_export.errors import CheckpointError
from qavp_export.safetensors_index import TensorInfo, find_weights, read_header
from tests.safetensors_files import LFS_POINTER, SHARDS, arrays, entry, write_index, write_raw


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(arrays(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = sorted(arrays())
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: arrays()[n] for n in names if weight_map[n] == shard}, tmp_path / shard)
    write_index(tmp_path, weight_map)
    return tmp_path


def read_weight_map(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


def read_or_refusal(path: Path) -> dict[str, TensorInfo] | str:
    try:
        return read_header(path)
    except CheckpointError as error:
        return str(error)


def library_shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


def message(folder: Path) -> str:
    """The one line that looking for the weights fails with."""
    with pytest.raises(CheckpointError) as caught:
        find_weights(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


class TestWeightFiles:
    def test_none(self, single: Path) -> None:
        (single / "model.safetensors").unlink()
        assert "has no weights: neither model.safetensors nor model.safetensors.index.json" in message(single)

    def test_dangling_link(self, single: Path) -> None:
        (single / "model.safetensors").unlink()
        (single / "model.safetensors").symlink_to("../../blobs/gone")
        assert "has no weights" in message(single)

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt", "c.pth", "last.ckpt"]
    )
    def test_pickle_only(self, single: Path, name: str) -> None:
        (single / "model.safetensors").rename(single / name)
        text = message(single)
        assert f"has only pickle weights ({name})" in text
        assert "safetensors with Hugging Face transformers" in text
        assert "save_pretrained" in text

    def test_shards_without_index(self, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").unlink()
        assert f"has {SHARDS[0]} but neither" in message(sharded)

    def test_missing_shard(self, sharded: Path) -> None:
        (sharded / SHARDS[1]).unlink()
        text = message(sharded)
        assert text.startswith(f"{SHARDS[1]} is missing from {sharded}, though model.safetensors.index.json names it")

    def test_dangling_link_is_a_missing_shard(self, sharded: Path) -> None:
        (sharded / SHARDS[1]).unlink()
        (sharded / SHARDS[1]).symlink_to("../../blobs/gone")
        assert f"{SHARDS[1]} is missing" in message(sharded)

    def test_all_shards_missing(self, sharded: Path) -> None:
        for shard in SHARDS:
            (sharded / shard).unlink()
        assert f"{SHARDS[0]} and 1 more are missing" in message(sharded)

    @pytest.mark.parametrize(
        "name",
        [
            "../x.safetensors",
            "/etc/x.safetensors",
            "sub/x.safetensors",
            "..\\x.safetensors",
            "..",
            "",
            "weights.bin",
            5,
        ],
    )
    def test_index_points_outside(self, sharded: Path, name: object) -> None:
        # The file exists where the index points, so only the name can be the reason.
        save_file(arrays(), sharded.parent / "x.safetensors")
        write_index(sharded, read_weight_map(sharded) | {"a.weight": name})
        text = message(sharded)
        assert "not the plain name of a .safetensors file in that folder" in text
        assert "a.weight" in text

    @pytest.mark.parametrize("name", ["x\n.safetensors", "x\0.safetensors", "x" * 300 + ".safetensors"])
    def test_index_names_an_impossible_file(self, sharded: Path, name: str) -> None:
        write_index(sharded, {"a.weight": name})
        assert "which cannot exist" in message(sharded)

    @pytest.mark.parametrize("content", [b"{", b"[]", LFS_POINTER, b"{}", b'{"weight_map": []}', b'{"weight_map": {}}'])
    def test_bad_index(self, sharded: Path, content: bytes) -> None:
        (sharded / "model.safetensors.index.json").write_bytes(content)
        text = message(sharded)
        assert "model.safetensors.index.json" in text
        assert any(part in text for part in ("JSON", "weight_map", "Git LFS"))

    def test_index_lists_a_tensor_twice(self, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").write_text(
            f'{{"weight_map": {{"a.weight": "{SHARDS[0]}", "a.weight": "{SHARDS[1]}"}}}}'
        )
        assert "a.weight is listed twice" in message(sharded)

    def test_shard_lacks_its_tensor(self, sharded: Path) -> None:
        write_index(sharded, read_weight_map(sharded) | {"ghost": SHARDS[0]})
        assert f"it puts tensor ghost in {SHARDS[0]}, which lacks it" in message(sharded)

    def test_tensor_is_in_another_shard(self, sharded: Path) -> None:
        weight_map = read_weight_map(sharded)
        other = SHARDS[1] if weight_map["a.weight"] == SHARDS[0] else SHARDS[0]
        write_index(sharded, weight_map | {"a.weight": other})
        assert f"it puts tensor a.weight in {other}, which lacks it" in message(sharded)

    def test_tensor_in_two_shards(self, sharded: Path) -> None:
        for shard in SHARDS:
            save_file({"same": np.zeros(1, np.float32)}, sharded / shard)
        write_index(sharded, {"same": SHARDS[0], "x": SHARDS[1]})
        assert f"tensor same is in both {SHARDS[0]} and {SHARDS[1]}" in message(sharded)

    def test_lfs_pointer(self, single: Path) -> None:
        (single / "model.safetensors").write_bytes(LFS_POINTER)
        text = message(single)
        assert "model.safetensors is a Git LFS pointer" in text
        assert f"run `git lfs pull` in {single}" in text

    def test_unreadable(self, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Root may read anything, so a failing disk stands in for missing permissions.
        def fail(self: Path, *_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: Permission denied; check"):
            find_weights(single)


class TestHeaders:
    def test_truncated_data(self, sharded: Path) -> None:
        whole = (sharded / SHARDS[1]).read_bytes()
        (sharded / SHARDS[1]).write_bytes(whole[:-5])
        sizes = f"header says {len(whole)} bytes, file has {len(whole) - 5}"
        assert message(sharded).endswith(f"{SHARDS[1]} is truncated: {sizes}; download it again")

    def test_truncated_header(self, single: Path) -> None:
        (single / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes()[:100])
        assert "is truncated: header says at least" in message(single)

    @pytest.mark.parametrize("size", [0, 1, 7])
    def test_almost_empty(self, single: Path, size: int) -> None:
        (single / "model.safetensors").write_bytes(b"\x10" * size)
        assert f"starts with 8 bytes of length, file has {size}" in message(single)

    @pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63, 2**64 - 1])
    def test_header_length_out_of_bounds(self, single: Path, length: int) -> None:
        (single / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        assert f"it announces a header of {length} bytes" in message(single)

    def test_header_beyond_the_file_is_not_allocated(self, single: Path) -> None:
        (single / "model.safetensors").write_bytes(struct.pack("<Q", 100_000_000) + b"{}")
        tracemalloc.start()
        try:
            assert "is truncated" in message(single)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000

    @pytest.mark.parametrize(
        ("header", "expected"),
        [
            (b"not json", "the header is not valid JSON"),
            (b"\xff\xff", "the header is not valid JSON"),
            (b"[" * 50_000, "too deeply nested"),
            (b"[]", "the header is not a JSON object"),
            ({"x": 1}, "tensor x is not an object"),
            ({"x": {}}, "tensor x has the unknown dtype <NoneType>"),
            ({"x": entry("F17", [1], 0, 2)}, "tensor x has the unknown dtype F17"),
            ({"x": entry("F16", [-1], 0, 2)}, "tensor x has no valid shape"),
            ({"x": entry("F16", [1.0], 0, 2)}, "tensor x has no valid shape"),
            ({"x": entry("F16", [True], 0, 2)}, "tensor x has no valid shape"),
            ({"x": entry("F16", [10**400], 0, 2)}, "tensor x has no valid shape"),
            ({"x": entry("F16", [1] * 65, 0, 2)}, "tensor x has no valid shape"),
            ({"x": entry("F16", [1], -2, 0)}, "tensor x has no valid data_offsets"),
            ({"x": entry("F16", [1], 0, "2")}, "tensor x has no valid data_offsets"),
            (
                {"x": {"dtype": "F16", "shape": [1], "data_offsets": [0]}},
                "tensor x has no valid data_offsets",
            ),
            ({"x": entry("F16", [1], 2, 0)}, "takes bytes 2 to 0, which does not fit F16 and shape (1,)"),
            ({"x": entry("F16", [2], 0, 2)}, "takes bytes 0 to 2, which does not fit F16 and shape (2,)"),
            ({"x": entry("F4", [3], 0, 1)}, "does not fit F4"),
            ({"x": entry("F16", [0, 2**62, 2**62], 0, 0)}, "does not fit F16"),
            ({"x": entry("F16", [2**62] * 64, 0, 2)}, "does not fit F16"),
            (
                {"x": entry("U8", [2], 0, 2), "y": entry("U8", [2], 1, 3)},
                "tensor y overlaps the tensor before it",
            ),
            ({"x": entry("U8", [1], 0, 1), "y": entry("U8", [1], 2, 3)}, "tensor y leaves a gap before it"),
            ({"x": entry("U8", [2], 0, 2)}, "header says"),
            (b'{"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "x": {}}', "x is listed twice"),
        ],
    )
    def test_corrupt(self, single: Path, header: object, expected: str) -> None:
        write_raw(single / "model.safetensors", header, b"\0" * 4)
        text = message(single)
        assert "model.safetensors is corrupt: " in text
        assert expected in text
        assert text.endswith("; download it again")
        assert len(text) < 1000

    def test_untrusted_names_are_escaped(self, single: Path) -> None:
        write_raw(single / "model.safetensors", {"x\ny\ud800" + "z" * 9999: 1})
        text = message(single)
        assert r"x\ny\ud800zzz" in text
        assert len(text) < 1000

    def test_truncated_at_every_eighth_byte(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file(arrays(), path)
        whole = path.read_bytes()
        for size in range(0, len(whole), 8):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match="is truncated"):
                read_header(path)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_flipped_bytes_never_raise_anything_else(self, tmp_path: Path, data: st.DataObject) -> None:
        path = tmp_path / "model.safetensors"
        save_file({name: arrays()[name] for name in ("a.weight", "empty", "ids")}, path)
        content = bytearray(path.read_bytes())
        header_end = 8 + struct.unpack_from("<Q", content)[0]
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, header_end - 1))
            content[position] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        ours, theirs = read_or_refusal(path), library_shapes(path)
        if isinstance(ours, str):
            assert "\n" not in ours
            assert theirs is None  # nothing is refused that the safetensors library accepts
            return
        ends = [info.offset + info.nbytes for info in ours.values()]
        starts = [info.offset for info in ours.values()]
        assert starts[1:] == ends[:-1]
        assert ends[-1] == len(content)
        if theirs is not None:
            assert {name: info.shape for name, info in ours.items()} == theirs
