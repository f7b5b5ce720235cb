"""Checkpoints: what is read, and one clear line for everything that can be wrong with one."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qavp_export.checkpoint import Checkpoint, read_config
from qavp_export.errors import CheckpointError
from tests.safetensors_files import LFS_POINTER, SHARDS, arrays, entry, write_index, write_raw

CONFIG = {"model_type": "llava", "text_config": {"model_type": "llama"}}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(arrays(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(arrays())
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: arrays()[n] for n in names if weight_map[n] == shard}, tmp_path / shard)
    write_index(tmp_path, weight_map)
    return tmp_path


def message(folder: Path) -> str:
    """The one line that opening the checkpoint fails with."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


class TestReading:
    @pytest.mark.parametrize("layout", ["single", "sharded"])
    def test_equals_what_was_written(self, layout: str, request: pytest.FixtureRequest) -> None:
        checkpoint = Checkpoint.open(request.getfixturevalue(layout))
        assert set(checkpoint.tensors) == set(arrays())
        for name, expected in arrays().items():
            info, got = checkpoint.tensors[name], checkpoint.read(name)
            assert (info.name, info.shape, info.nbytes) == (name, expected.shape, expected.nbytes)
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
        assert checkpoint.total_bytes == sum(array.nbytes for array in arrays().values())
        assert checkpoint.config == CONFIG

    def test_bfloat16(self, single: Path) -> None:
        # Bit patterns by hand: 1.0 is 0x3F80, -2.0 is 0xC000, 0.5 is 0x3F00.
        header = {"x": entry("BF16", [3], 0, 6)}
        write_raw(single / "model.safetensors", header, struct.pack("<3H", 0x3F80, 0xC000, 0x3F00))
        array = Checkpoint.open(single).read_checked("x", (3,))
        assert array.dtype == ml_dtypes.bfloat16
        assert array.astype(np.float32).tolist() == [1.0, -2.0, 0.5]

    def test_tensor_at_an_odd_offset(self, single: Path) -> None:
        header = {"pad": entry("U8", [1], 0, 1), "x": entry("F32", [2], 1, 9)}
        write_raw(single / "model.safetensors", header, b"\x07" + struct.pack("<2f", 1.5, -3.0))
        assert Checkpoint.open(single).read("x").tolist() == [1.5, -3.0]

    def test_agrees_with_the_safetensors_library(self, single: Path) -> None:
        reference = load_file(single / "model.safetensors")
        checkpoint = Checkpoint.open(single)
        for name, array in reference.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)

    def test_tensors_are_read_only(self, single: Path) -> None:
        with pytest.raises(TypeError):
            Checkpoint.open(single).tensors["new"] = None  # type: ignore[index]

    def test_single_file_wins_over_index(self, single: Path) -> None:
        write_index(single, {"x": "gone.safetensors"})
        assert "a.weight" in Checkpoint.open(single).tensors

    def test_hub_snapshot_of_symlinks(self, sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        cache = tmp_path_factory.mktemp("models--org--name")
        snapshot = cache / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        for number, file in enumerate(sorted(sharded.iterdir())):
            (cache / "blobs" / f"{number:064x}").write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
        checkpoint = Checkpoint.open(snapshot)
        for name, expected in arrays().items():
            np.testing.assert_array_equal(checkpoint.read(name), expected)
        assert checkpoint.extra_files() == [snapshot / "config.json"]

    def test_only_the_wanted_tensor_is_loaded(self, single: Path) -> None:
        # A sparse file: 4 GB of float16 that take no disk, then four floats.
        big = 4 << 30
        header = {"big": entry("F16", [big // 2], 0, big), "small": entry("F32", [4], big, big + 16)}
        write_raw(single / "model.safetensors", header)
        with (single / "model.safetensors").open("r+b") as file:
            file.truncate(file.seek(0, 2) + big)
            file.seek(0, 2)
            file.write(struct.pack("<4f", 1, 2, 3, 4))
        tracemalloc.start()
        try:
            checkpoint = Checkpoint.open(single)
            small = checkpoint.read_checked("small", (4,))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert small.tolist() == [1, 2, 3, 4]
        assert checkpoint.total_bytes == big + 16
        assert peak < 1_000_000  # NumPy reports its allocations to tracemalloc: 4 GB would show


class TestConfig:
    def test_no_folder(self, tmp_path: Path) -> None:
        assert message(tmp_path / "nowhere") == f"checkpoint folder {tmp_path}/nowhere does not exist; check the path"

    def test_folder_name_too_long(self, tmp_path: Path) -> None:
        assert "does not exist" in message(tmp_path / ("x" * 5000))

    def test_folder_is_a_file(self, single: Path) -> None:
        assert "does not exist" in message(single / "model.safetensors")

    def test_no_config(self, single: Path) -> None:
        (single / "config.json").unlink()
        assert message(single).startswith(f"{single} has no config.json; give the folder of a Hugging Face checkpoint")

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"{", "config.json is corrupt: the file is not valid JSON"),
            (b"\xff\xfe", "config.json is corrupt: the file is not valid JSON"),
            (b"", "config.json is corrupt: the file is not valid JSON"),
            (b"[1]", "config.json is corrupt: the file is not a JSON object"),
            (b'{"a": 1, "a": 2}', "a is listed twice"),
            (b'{"a":' * 100_000, "too deeply nested"),
            (LFS_POINTER, "config.json is a Git LFS pointer, not the file itself; run `git lfs pull`"),
            (b" " * 16_000_001, "larger than 16000000 bytes"),
        ],
    )
    def test_bad_config(self, single: Path, content: bytes, expected: str) -> None:
        (single / "config.json").write_bytes(content)
        assert expected in message(single)

    def test_dry_run_needs_no_weights(self, single: Path) -> None:
        (single / "model.safetensors").unlink()
        assert read_config(single) == CONFIG

    @pytest.mark.parametrize(
        ("extra", "expected"),
        [
            ({}, False),
            ({"auto_map": {"AutoModel": "modeling.Model"}}, True),
            ({"vision_config": {"auto_map": {"AutoModel": "tower.Tower"}}}, True),
        ],
    )
    def test_needs_remote_code(self, single: Path, extra: dict[str, Any], expected: bool) -> None:
        (single / "config.json").write_text(json.dumps(CONFIG | extra))
        assert Checkpoint.open(single).needs_remote_code is expected


def test_faults_of_the_weight_files_are_reported(sharded: Path) -> None:
    # tests/test_safetensors_index.py has them all; this is that opening a checkpoint looks for them.
    (sharded / SHARDS[1]).unlink()
    assert message(sharded).startswith(f"{SHARDS[1]} is missing from {sharded}")


class TestChecks:
    def test_read_checked_returns_the_tensor(self, single: Path) -> None:
        checkpoint = Checkpoint.open(single)
        for name in ("a.weight", "b.weight", "c.bias", "scalar", "empty"):
            expected = arrays()[name]
            np.testing.assert_array_equal(checkpoint.read_checked(name, expected.shape), expected)

    def test_unknown_tensor(self, single: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no tensor nope; check"):
            Checkpoint.open(single).read("nope")
        with pytest.raises(CheckpointError, match=r"1 tensor missing \(nope\)"):
            Checkpoint.open(single).read_checked("nope", (1,))

    def test_wrong_shape(self, single: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"a\.weight in model\.safetensors has shape \(3, 5\), expected \(5, 3\)"
        ):
            Checkpoint.open(single).read_checked("a.weight", (5, 3))

    @pytest.mark.parametrize(
        ("dtype", "size"), [("I8", 4), ("U8", 4), ("F8_E4M3", 4), ("F4", 2), ("I64", 32), ("BOOL", 4)]
    )
    def test_wrong_dtype(self, single: Path, dtype: str, size: int) -> None:
        write_raw(single / "model.safetensors", {"x": entry(dtype, [4], 0, size)}, bytes(size))
        checkpoint = Checkpoint.open(single)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read_checked("x", (4,))
        assert str(caught.value) == (
            f"the weights in {single} do not fit its config.json: 1 tensor of wrong dtype (x in model.safetensors is "
            f"stored as {dtype}, expected F16 or BF16 or F32 or F64); check that both come from the same model, or "
            "download it again; a quantized checkpoint needs the quantization_config that its quantizer wrote"
        )
        if dtype.startswith("F"):
            with pytest.raises(
                CheckpointError, match=rf"tensor x in .*is stored as {dtype}, which cannot be read; use"
            ):
                checkpoint.read("x")

    def test_allowed_dtypes(self, single: Path) -> None:
        checkpoint = Checkpoint.open(single)
        checkpoint.check_expected({"ids": (6,), "scalar": ()}, {"ids": ("I32", "I64")})
        with pytest.raises(CheckpointError, match=r"ids in model\.safetensors is stored as I64, expected I8 or I32\)"):
            checkpoint.check_expected({"ids": (6,)}, {"ids": ("I8", "I32")})
        # A float is no substitute for an integer.
        with pytest.raises(CheckpointError, match=r"scalar in model\.safetensors is stored as F32, expected I32"):
            checkpoint.check_expected({"scalar": ()}, {"scalar": ("I32",)})

    @pytest.mark.parametrize("part", ["qweight", "weight_packed"])
    def test_quantized_tensors_in_the_place_of_weights(self, single: Path, part: str) -> None:
        save_file({f"x.{part}": np.zeros((1, 4), np.int32)}, single / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"1 tensor missing \(x\.weight\); .* needs the quantization_config"):
            Checkpoint.open(single).check_expected({"x.weight": (4, 8)})

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
    @pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
    def test_not_finite(self, single: Path, dtype: Any, value: float) -> None:
        # Larger than one chunk of the check, so that the index is counted across chunks.
        array = np.full((300, 400), np.finfo(np.float16).max, dtype)
        array[200, 7] = array[299, 399] = value
        save_file({"x": array}, single / "model.safetensors")
        expected = r"tensor x in .*model\.safetensors has 2 NaN or infinite values, the first at index \(200, 7\)"
        with pytest.raises(CheckpointError, match=expected):
            Checkpoint.open(single).read_checked("x", (300, 400))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_extreme_finite_values_pass(self, single: Path, dtype: Any) -> None:
        info = np.finfo(dtype)
        array = np.array([info.max, info.min, info.smallest_subnormal, -0.0], dtype)
        save_file({"x": array}, single / "model.safetensors")
        np.testing.assert_array_equal(Checkpoint.open(single).read_checked("x", (4,)), array)

    def test_scalar_not_finite(self, single: Path) -> None:
        save_file({"x": np.array(np.nan, np.float32)}, single / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"has 1 NaN or infinite value, the first at index \(\)"):
            Checkpoint.open(single).read_checked("x", ())

    def test_file_shrinks_after_opening(self, single: Path) -> None:
        checkpoint = Checkpoint.open(single)
        (single / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes()[:-4])
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset + info.nbytes)
        with pytest.raises(CheckpointError, match=r"shrank since it was opened"):
            checkpoint.read(last.name)

    def test_check_expected_passes(self, single: Path) -> None:
        Checkpoint.open(single).check_expected({"a.weight": (3, 5), "scalar": ()})

    def test_check_expected_reports_everything_in_one_line(self, single: Path) -> None:
        expected: dict[str, tuple[int, ...]] = {f"missing.{i}": (1,) for i in range(5)}
        expected |= {"a.weight": (1, 2), "b.weight": (2, 3, 4)}
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(single).check_expected(expected)
        assert str(caught.value) == (
            f"the weights in {single} do not fit its config.json: "
            "5 tensors missing (missing.0, missing.1, missing.2 and 2 more); "
            "1 tensor of wrong shape (a.weight in model.safetensors has shape (3, 5), expected (1, 2)); "
            "check that both come from the same model, or download it again"
        )


class TestExtraFiles:
    def test_what_is_copied(self, single: Path) -> None:
        wanted = [
            "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
            "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
            "special_tokens_map.json",
            "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
        ]  # fmt: skip
        unwanted = [
            "README.md",
            "modeling_llava.py",
            "other.model",
            "tokenizer.bin",
            "tokenization.py",
            "weights.json",
        ]
        for name in wanted + unwanted:
            if name != "config.json":
                (single / name).write_text("{}")
        (single / "tokenizer_folder.json").mkdir()
        assert Checkpoint.open(single).extra_files() == [single / name for name in wanted]

    def test_lfs_pointer(self, single: Path) -> None:
        (single / "tokenizer.model").write_bytes(LFS_POINTER)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model is a Git LFS pointer"):
            Checkpoint.open(single).extra_files()
