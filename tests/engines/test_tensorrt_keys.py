"""What engines were built for is compared with the machine, and their files with their hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from qavp_export.engines.tensorrt.keys import (
    IN_PLACE,
    KEYS_NAME,
    EngineKeys,
    GraphKeys,
    Machine,
    Profiles,
    check_keys,
    engine_folder,
)
from qavp_export.errors import BundleError, UnavailableError

RTX = "tensorrt-rtx"
HERE = Machine("1.7.1.116", 89, 13000)


def _write(bundle: Path, flavour: str = RTX, driver: int | None = None) -> EngineKeys:
    folder = bundle / engine_folder(flavour)
    folder.mkdir(parents=True)
    (folder / "decoder.engine").write_bytes(b"engine")
    graph = GraphKeys.of(folder / "decoder.engine", ("a", "b"), ("c",), {"x": "int4"}, {"x": "fp16"})
    keys = EngineKeys(
        flavour, "1.7.1.116", (86, 89), driver, Profiles(640, 1024, 2), IN_PLACE, {"decoder": graph}, ("weights only",)
    )
    keys.write(folder)
    return keys


def test_keys_are_read_as_they_were_written(tmp_path: Path) -> None:
    keys = _write(tmp_path)
    assert keys.graphs["decoder"].sha256 == hashlib.sha256(b"engine").hexdigest()
    assert keys.graphs["decoder"].bytes == 6
    assert EngineKeys.read(tmp_path, RTX) == keys
    check_keys(keys, HERE, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "1.6.0.1"}, "TensorRT-RTX 1.7.1.116 built it, 1.6.0.1 is installed"),
        # The same release in another build is another release.
        ({"version": "1.7.1.117"}, "TensorRT-RTX 1.7.1.116 built it, 1.7.1.117 is installed"),
        ({"capability": 120}, "it is for compute capability 8.6 or 8.9, the GPU has 12.0"),
    ],
)
def test_another_machine(tmp_path: Path, change: dict[str, object], message: str) -> None:
    keys = _write(tmp_path)
    found = dataclasses.replace(HERE, **change)
    with pytest.raises(UnavailableError) as caught:
        check_keys(keys, found, tmp_path)
    assert str(caught.value) == (
        f"the tensorrt-rtx engine of {tmp_path} does not fit this machine: {message}: rebuild it with "
        f"qavp-export ... --engine tensorrt-rtx --sm {found.capability}"
    )


def test_all_that_differs_is_said_at_once(tmp_path: Path) -> None:
    keys = _write(tmp_path, "tensorrt", driver=13000)
    with pytest.raises(UnavailableError) as caught:
        check_keys(keys, Machine("10.13.3", 75, 12080), tmp_path)
    assert str(caught.value).endswith(
        "TensorRT 1.7.1.116 built it, 10.13.3 is installed; it is for compute capability 8.6 or 8.9, the GPU has 7.5; "
        "it needs a driver for CUDA 13.0, this one is for 12.8: rebuild it with qavp-export ... --engine tensorrt "
        "on a machine with this GPU"
    )


def test_a_newer_driver_runs_what_an_older_one_did(tmp_path: Path) -> None:
    check_keys(_write(tmp_path, "tensorrt", driver=13000), dataclasses.replace(HERE, driver=13020), tmp_path)


def test_a_gpu_that_tensorrt_rtx_does_not_build_for(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"--engine tensorrt, since TensorRT-RTX does not build for .* 9\.0$"):
        check_keys(_write(tmp_path), dataclasses.replace(HERE, capability=90), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "decoder.engine is missing"),
        (b"engines", "has 7 bytes, not 6"),
        (b"Engine", r"was changed after the export \(other SHA-256\)"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    keys = _write(tmp_path)
    path = tmp_path / engine_folder(RTX) / "decoder.engine"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=message):
        check_keys(keys, HERE, tmp_path)


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        EngineKeys.read(tmp_path, RTX)
    assert str(caught.value) == (
        f"bundle {tmp_path} has no engine for tensorrt-rtx; export it with --engine tensorrt-rtx --sm NN"
    )


@pytest.mark.parametrize("file", ["/etc/passwd", "../decoder/model.onnx", "a/../../b"])
def test_files_outside_the_bundle(tmp_path: Path, file: str) -> None:
    keys = _write(tmp_path)
    graphs = {"decoder": dataclasses.replace(keys.graphs["decoder"], file=file)}
    dataclasses.replace(keys, graphs=graphs).write(tmp_path / engine_folder(RTX))
    with pytest.raises(BundleError, match="a file outside the bundle"):
        EngineKeys.read(tmp_path, RTX)


@pytest.mark.parametrize("damage", ["{", "[]", '{"flavour": "tensorrt-rtx"}'])
def test_keys_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    _write(tmp_path)
    (tmp_path / engine_folder(RTX) / KEYS_NAME).write_text(damage, encoding="utf-8")
    with pytest.raises(BundleError, match=r"engine.json cannot be read \(.*\); export the bundle again$"):
        EngineKeys.read(tmp_path, RTX)


@pytest.mark.parametrize(
    ("field", "value"), [("capabilities", 89), ("graphs", {"decoder": {"file": 3}}), ("profiles", {"capacity": 3})]
)
def test_keys_with_other_types(tmp_path: Path, field: str, value: object) -> None:
    _write(tmp_path)
    path = tmp_path / engine_folder(RTX) / KEYS_NAME
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, field: value}), encoding="utf-8")
    with pytest.raises(BundleError, match="cannot be read"):
        EngineKeys.read(tmp_path, RTX)


def test_keys_of_another_flavour(tmp_path: Path) -> None:
    keys = _write(tmp_path)
    dataclasses.replace(keys, flavour="tensorrt").write(tmp_path / engine_folder(RTX))
    with pytest.raises(BundleError, match="is of an engine for 'tensorrt'"):
        EngineKeys.read(tmp_path, RTX)
