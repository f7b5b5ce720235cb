"""Writes and verifies bundles. A bundle exists whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import onnx
import onnx_ir as ir

from qavp_export.errors import BundleError, InputError, QavpError
from qavp_export.manifest import MANIFEST_NAME, Component, FileEntry, Manifest, TensorSpec

GRAPH_NAME = "model.onnx"

# (tensors written, tensors in all)
TensorProgress = Callable[[int, int], None]


class BundleWriter:
    """Builds a bundle in a temporary folder beside the target and renames it when it is complete.

    Used as a context manager: whatever ends the block before `commit`, an error or Ctrl-C, removes the temporary folder
    and leaves the target as it was.

    Args:
        target: The bundle's folder.
        force: Whether an existing bundle at `target` is replaced; only at `commit`, once the new one is complete.

    Raises:
        InputError: `target` exists and `force` is not set, or it exists and is not a bundle, or its parent folder
            cannot be written.
    """

    def __init__(self, target: Path, *, force: bool) -> None:
        self.target = target
        check_target(target, force=force)
        # Nearest first; those that this run makes go again if it fails.
        self._new_parents = [parent for parent in target.parents if not parent.exists()]
        self.folder = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"

    def __enter__(self) -> BundleWriter:
        # The name is known before the folder exists: an interrupt at any point finds what to remove.
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except OSError as error:
            self._remove()
            raise InputError(f"cannot write to {self.target.parent} ({error.strerror}); choose another -o") from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()
        if isinstance(error, OSError) and _is_disk_full(error):
            raise QavpError(
                f"no space left for {self.target}; free some or choose another -o (nothing was left behind)"
            ) from error

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.target.exists():
            for parent in self._new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """Returns a folder on the same disk for what is needed meanwhile; a context manager that removes it."""
        return tempfile.TemporaryDirectory(prefix="scratch.", dir=self.folder)

    def copy(self, files: list[Path]) -> None:
        """Copies files of the checkpoint (configuration, tokenizer, processor) into the bundle's top folder."""
        for file in files:
            shutil.copyfile(file, self.folder / file.name)

    def write_graph(self, component: str, model: ir.Model, progress: TensorProgress) -> Component:
        """Writes one graph, evaluating and writing its tensors one by one.

        Args:
            component: The component's name, which becomes its folder.
            model: The graph; its initializers may be lazy.
            progress: Called before each tensor.

        Returns:
            The component's entry for the manifest.
        """
        folder = self.folder / component
        folder.mkdir()

        def on_tensor(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
            progress(info.index, info.total)

        path = folder / GRAPH_NAME
        ir.save(model, path, external_data=f"{GRAPH_NAME}.data", callback=on_tensor)
        onnx.checker.check_model(path)
        return Component(
            file=f"{component}/{GRAPH_NAME}",
            inputs=[_tensor_spec(value) for value in model.graph.inputs],
            outputs=[_tensor_spec(value) for value in model.graph.outputs],
        )

    def commit(self, manifest: Manifest) -> Manifest:
        """Writes the manifest and puts the bundle in place.

        Args:
            manifest: Everything but `files`, which is filled in here.

        Returns:
            The manifest as written.
        """
        manifest = dataclasses.replace(manifest, files=list_files(self.folder))
        (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        if self.target.exists():
            with tempfile.TemporaryDirectory(
                prefix=f".{self.target.name}.", suffix=".old", dir=self.target.parent
            ) as old:
                self.target.rename(Path(old) / self.target.name)
                self.folder.rename(self.target)
        else:
            self.folder.rename(self.target)
        return manifest


def _is_disk_full(error: OSError) -> bool:
    # NumPy, which writes the tensors, reports a short write without an errno.
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or bool(re.search(r"requested and \d+ written", str(error)))


def check_target(target: Path, *, force: bool) -> None:
    """Checks that a bundle may be written to `target`.

    Raises:
        InputError: It exists and `force` is not set, or it exists and is neither empty nor a bundle.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} exists and is not a folder; choose another -o")
    if not force:
        raise InputError(f"{target} exists; pass --force to replace it, or choose another -o")
    if any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
        raise InputError(f"{target} holds files that are not a bundle; --force will not remove it: choose another -o")


def list_files(folder: Path) -> list[FileEntry]:
    """Returns every file below `folder` except the manifest, sorted by path, with size and SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    return [FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path)) for path in paths]


def verify_files(bundle: Path, manifest: Manifest) -> None:
    """Compares every file of a bundle with its manifest.

    Raises:
        BundleError: A file is missing, was changed, or is not listed; the message names the first.
    """
    found = {entry.path: entry for entry in list_files(bundle)}
    for entry in manifest.files:
        actual = found.pop(entry.path, None)
        if actual is None:
            raise BundleError(f"{bundle / entry.path} is missing; export the bundle again")
        if actual != entry:
            what = f"{actual.bytes} bytes, not {entry.bytes}" if actual.bytes != entry.bytes else "other content"
            raise BundleError(f"{bundle / entry.path} was changed after the export ({what}); export the bundle again")
    if found:
        raise BundleError(f"{bundle / min(found)} is not part of the bundle; remove it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_spec(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise TypeError(f"graph input or output {value.name} lacks a dtype or a shape")
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return TensorSpec(value.name, value.dtype.name.lower(), shape)
