"""Bundles: whole or not at all, and any change is noticed."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qavp_export.bundle import BundleWriter, check_target, list_files, verify_files
from qavp_export.errors import BundleError, InputError, QavpError
from qavp_export.manifest import MANIFEST_NAME, DecoderSpec, Manifest, VisionTokens


def manifest() -> Manifest:
    return Manifest(
        source="here",
        family="llava",
        recipe={"keep": 0.5},
        vision_tokens=VisionTokens(4, 2, "<image>", 3, "contiguous", keep=0.5),
        decoder=DecoderSpec(1, 1, 8, 8, 10, 32, [2], 0),
        components={},
        precision={"decoder:/a": "w4a4"},
        weight_error={"model.layers.0.mlp.up_proj": 0.1},
        notes=[],
        calibration={"data": "pictures", "sha256": "0" * 64, "prompts": 2, "sensitivity": {}},
        checkpoint_bytes=1,
        checkpoint_quantization={"layout": "gptq"},
        parity={"verdict": "PASS"},
        versions={},
    )


def _write(target: Path, *, force: bool = False, text: str = "hello") -> Manifest:
    source = target.parent / "config.json"
    source.write_text(text)
    with BundleWriter(target, force=force) as writer:
        writer.copy([source])
        return writer.commit(manifest())


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_committed_bundle_reads_back_and_verifies(tmp_path: Path) -> None:
    written = _write(tmp_path / "bundle")
    read = Manifest.read(tmp_path / "bundle")
    assert read == written
    assert [entry.path for entry in read.files] == ["config.json"]
    # sha256 of "hello", from any other tool.
    assert read.files[0].sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    verify_files(tmp_path / "bundle", read)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "new" / "newer" / "bundle", force=False) as writer:
            (writer.folder / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kept"), [(KeyboardInterrupt(), True), (MemoryError(), True), (InputError("not a picture"), False)]
)
def test_what_can_be_resumed_is_kept_if_asked_for(tmp_path: Path, error: BaseException, kept: bool) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "bundle", force=False, resume=True, identity={"recipe": 1}) as writer:
            writer.journal["done"] = 1
            raise error

    with pytest.raises(type(error)):
        fail()
    with BundleWriter(tmp_path / "bundle", force=False, resume=True, identity={"recipe": 1}) as writer:
        assert ("done" in writer.journal) == kept
        writer.commit(manifest())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What NumPy raised when a 2 MB file system filled up.
        OSError("32768 requested and 8192 written"),
    ],
)
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path, error: OSError) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "bundle", force=False):
            raise error

    with pytest.raises(QavpError, match=r"no space left for .*bundle; free some or choose another -o") as caught:
        fail()
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_only_when_the_new_bundle_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _write(target, text="old")

    def fail() -> None:
        with BundleWriter(target, force=True):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "config.json").read_text() == "old"
    _write(target, force=True, text="new")
    assert (target / "config.json").read_text() == "new"
    assert leftovers(tmp_path) == []


def test_existing_targets_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _write(target)
    with pytest.raises(InputError, match="exists; pass --force"):
        check_target(target, force=False)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a bundle; --force will not remove it"):
        check_target(precious, force=True)
    with pytest.raises(InputError, match="not a folder"):
        check_target(precious / "thesis.txt", force=True)


def test_every_change_is_noticed(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    manifest = _write(target)
    file = target / "config.json"
    file.write_text("hellO")
    with pytest.raises(BundleError, match=r"config\.json was changed after the export \(other content\)"):
        verify_files(target, manifest)
    file.write_text("hello!")
    with pytest.raises(BundleError, match="6 bytes, not 5"):
        verify_files(target, manifest)
    file.unlink()
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        verify_files(target, manifest)
    file.write_text("hello")
    (target / "extra").write_text("")
    with pytest.raises(BundleError, match="extra is not part of the bundle"):
        verify_files(target, manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 2}', "schema version 2, this qavp-export reads 3"),
        ('{"schema_version": 3}', "is incomplete"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(BundleError, match=message):
        Manifest.read(tmp_path)


def test_no_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no qavp\.json"):
        Manifest.read(tmp_path)


def test_graphs_are_written_with_external_data_and_described(tmp_path: Path) -> None:
    x = ir.Value(name="x", shape=ir.Shape(("batch", 64)), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Tensor(np.ones((64, 64), np.float32), name="w")
    w = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=weight)
    node = ir.node("MatMul", [x, w], name="/MatMul")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", x.shape, x.type
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    seen: list[tuple[int, int]] = []
    with BundleWriter(tmp_path / "bundle", force=False) as writer:
        component = writer.write_graph("decoder", ir.Model(graph, ir_version=11), lambda *step: seen.append(step))
        files = {entry.path: entry.bytes for entry in list_files(writer.folder)}
    assert component.file == "decoder/model.onnx"
    assert [(spec.name, spec.dtype, spec.shape) for spec in component.inputs] == [("x", "float", ["batch", 64])]
    assert files["decoder/model.onnx.data"] == 64 * 64 * 4
    assert files["decoder/model.onnx"] < 1000
    assert seen == [(0, 1)]
