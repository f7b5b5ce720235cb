"""Writes and verifies bundles. A bundle exists whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx
import onnx_ir as ir
from filelock import FileLock, Timeout

from qavp_export.errors import BundleError, InputError, QavpError
from qavp_export.journal import Journal
from qavp_export.manifest import MANIFEST_NAME, Component, FileEntry, Manifest, TensorSpec
from qavp_export.weight_file import WeightFile

GRAPH_NAME = "model.onnx"
_WORK = "work"

# (tensors written, tensors in all)
TensorProgress = Callable[[int, int], None]


class BundleWriter:
    """Builds a bundle in a folder `.<name>.partial` beside the target and renames it when it is complete.

    Used as a context manager: whatever ends the block before `commit`, an error or Ctrl-C, leaves the target as it was
    and removes the folder. With `resume` the folder is left for the next run, unless that would fail like this one: on
    bad input or a failed check.

    Args:
        target: The bundle's folder.
        force: Whether an existing bundle at `target` is replaced; only at `commit`, once the new one is complete.
        resume: Whether to go on where an interrupted run has stopped, and to let the next run do so.
        identity: JSON values that tell this export from others; only one with the same identity is resumed.

    Attributes:
        folder: Where the bundle is built.
        work: A folder for what is needed meanwhile; it is not part of the bundle.
        journal: What is finished.

    Raises:
        InputError: `target` exists and `force` is not set, or it exists and is not a bundle, or its parent folder
            cannot be written, another run is at work on it, or what an interrupted run has left has another identity.
    """

    def __init__(
        self, target: Path, *, force: bool, resume: bool = False, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.target = target
        check_target(target, force=force)
        self.folder = target.parent / f".{target.name}.partial"
        self.work = self.folder / _WORK
        self.journal = Journal(self.work / "journal")
        self._resume = resume
        self._identity = json.loads(json.dumps(identity or {}))
        # Nearest first; those that this run makes go again if it fails.
        self._new_parents = [parent for parent in target.parents if not parent.exists()]
        self._lock = FileLock(self.folder / ".lock", timeout=0)

    def __enter__(self) -> BundleWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another qavp-export is writing {self.target}; wait for it, or choose another -o"
            ) from error
        except OSError as error:
            self._remove()
            raise InputError(f"cannot write to {self.target.parent} ({error.strerror}); choose another -o") from error
        except BaseException:
            self._remove()
            raise
        try:
            self._begin()
        except InputError:
            # What is there is another run's, which may still go on.
            self._lock.release()
            raise
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(error)
        if isinstance(error, OSError) and _is_disk_full(error):
            left = "run again with --resume to go on" if self._resume else "nothing was left behind"
            raise QavpError(f"no space left for {self.target}; free some or choose another -o ({left})") from error

    def _begin(self) -> None:
        """Takes over what an interrupted run has left, or clears it away."""
        if self._resume and "identity" in self.journal:
            before = self.journal["identity"]
            differing = sorted(key for key in {*before, *self._identity} if before.get(key) != self._identity.get(key))
            if differing:
                raise InputError(
                    f"{self.folder} is left of an interrupted export with another {differing[0]}; "
                    "run without --resume to start anew"
                )
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        self.work.mkdir()
        self.journal = Journal(self.work / "journal")
        self.journal["identity"] = self._identity

    def _leave(self, error: BaseException | None) -> None:
        if self._resume and error is not None and not isinstance(error, QavpError):
            self._lock.release()
        else:
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if not self.target.exists():
            for parent in self._new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()

    def copy(self, files: list[Path], into: str = "") -> None:
        """Copies files of a checkpoint (configuration, tokenizer, processor) into the bundle, or a folder of it."""
        folder = self.folder / into
        folder.mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)

    def open_graph(self, component: str, model: ir.Model) -> WeightFile:
        """Opens the file of one graph; its weights may then be written in any order.

        Args:
            component: The component's name, which becomes its folder.
            model: The graph in its final form; its initializers may be lazy.
        """
        folder = self.folder / component
        folder.mkdir(exist_ok=True)
        return WeightFile(folder / GRAPH_NAME, model, self.journal.section(component))

    def write_graph(self, component: str, model: ir.Model, progress: TensorProgress) -> Component:
        """Writes one graph, evaluating and writing its tensors one by one.

        Args:
            component: The component's name, which becomes its folder.
            model: The graph; its initializers may be lazy.
            progress: Called before each tensor.

        Returns:
            The component's entry for the manifest.
        """
        self.open_graph(component, model).finish(progress)
        return describe_component(component, model)

    def update_graph(self, component: str, model: ir.Model) -> None:
        """Writes a graph again whose tensors are in its file already.

        Args:
            component: The component's name.
            model: The graph that `write_graph` has written; nodes may have changed since, initializers not.
        """
        path = self.folder / component / GRAPH_NAME
        ir.save(model, path)
        onnx.checker.check_model(path)

    def commit(self, manifest: Manifest) -> Manifest:
        """Writes the manifest and puts the bundle in place.

        Args:
            manifest: Everything but `files`, which is filled in here.

        Returns:
            The manifest as written.
        """
        manifest = dataclasses.replace(manifest, files=list_files(self.folder, besides=(_WORK, ".lock")))
        (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        shutil.rmtree(self.work)
        (self.folder / ".lock").unlink()
        if self.target.exists():
            with tempfile.TemporaryDirectory(
                prefix=f".{self.target.name}.", suffix=".old", dir=self.target.parent
            ) as old:
                self.target.rename(Path(old) / self.target.name)
                self.folder.rename(self.target)
        else:
            self.folder.rename(self.target)
        return manifest


def describe_component(component: str, model: ir.Model) -> Component:
    """Returns a graph's entry for the manifest."""
    return Component(
        file=f"{component}/{GRAPH_NAME}",
        inputs=[_tensor_spec(value) for value in model.graph.inputs],
        outputs=[_tensor_spec(value) for value in model.graph.outputs],
    )


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


def list_files(folder: Path, besides: Collection[str] = ()) -> list[FileEntry]:
    """Returns every file below `folder` except the manifest, sorted by path, with size and SHA-256.

    Args:
        folder: The bundle.
        besides: Names in its top folder that are left out.
    """
    left_out = {MANIFEST_NAME, *besides}
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in left_out)
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
