"""Reads calibration data: image prompts from a JSONL file or a folder, drawn under a seed.

The data are untrusted input: no name leads out of its folder, and sizes are checked before anything is read. Images
are only checked to exist; `runtime/images.py` decodes them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from qavp_export.errors import CalibrationError
from qavp_export.safetensors_index import shown

DEFAULT_PROMPT = "Describe the image."
"""The prompt of a picture that has no text file beside it."""

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Files that count as pictures in a folder without a .jsonl file, in any case."""

_DEMO_PACKAGE = "qavp_export.calibration.demo"
_DEMO_NAME = "shapes_vqa"

_MAX_TEXT_BYTES = 1_000_000  # one line of JSONL, or one prompt's text file
_MAX_JSONL_BYTES = 250_000_000  # all lines are held in memory


@dataclass(frozen=True)
class CalibrationItem:
    """One prompt with its images.

    Attributes:
        images: The image files, in the order in which the prompt shows them; at least one.
        prompt: What the user asks, as the data spell it.
        answer: The answer that follows, if known.
    """

    images: tuple[Path, ...]
    prompt: str
    answer: str | None


@dataclass(frozen=True)
class CalibrationSet:
    """The items drawn from calibration data.

    Attributes:
        items: The items in the order of the draw; at least one.
        name: Name of the file or folder they come from, without the folders that lead to it.
        digest: SHA-256 in hex over the items in order: image bytes, prompts and answers, but no file names.
    """

    items: tuple[CalibrationItem, ...]
    name: str
    digest: str

    def describe(self) -> dict[str, Any]:
        """Returns what the manifest says of the data."""
        return {"data": self.name, "sha256": self.digest, "prompts": len(self.items)}


def read_calibration(path: Path, limit: int, seed: int) -> CalibrationSet:
    """Draws items from the user's calibration data.

    All data are checked, not only what is drawn, so that an error does not depend on the seed.

    Args:
        path: A .jsonl file; or a folder that holds one; or a folder of pictures, where the file `a.txt` is the prompt
            of `a.jpg`. Each line of JSONL is an object with `image` (a file name relative to the file's folder) or
            `images` (a list of them), `prompt` or `question`, and optionally `answer`; other keys are ignored.
        limit: Number of items to draw, at least 1; if there are fewer, all are taken.
        seed: Seed of the draw. Under one seed, a smaller limit gives the first items of a larger one.

    Returns:
        The drawn items, the same for the same data, limit and seed on every file system.

    Raises:
        CalibrationError: The data do not exist, are empty, malformed, too large, or lead out of their folder.
    """
    if limit < 1:
        raise CalibrationError(f"cannot calibrate on {limit} items; take at least 1")
    try:
        items = _read_items(path)
        drawn = tuple(items[index] for index in np.random.default_rng(seed).permutation(len(items))[:limit])
        return CalibrationSet(drawn, shown(path.resolve().name), _digest(drawn))
    except OSError as error:
        reason = error.strerror or error
        raise CalibrationError(
            f"cannot read {error.filename or path}: {reason}; check the file and its permissions"
        ) from error


def demo_calibration(limit: int, seed: int) -> CalibrationSet:
    """Draws items from the demo data that ship with the package: questions about pictures of shapes.

    Args:
        limit: Number of items to draw, at least 1.
        seed: Seed of the draw.

    Raises:
        CalibrationError: The limit is below 1, or the installed data were damaged.
    """
    drawn = read_calibration(Path(str(files(_DEMO_PACKAGE))), limit, seed)
    return replace(drawn, name=_DEMO_NAME)  # the folder's own name differs between a source tree and a wheel


def _read_items(path: Path) -> list[CalibrationItem]:
    if path.is_dir():
        return _read_folder(_Folder(path))
    if not path.exists():
        raise CalibrationError(f"calibration data {path} do not exist; check the path")
    if not path.is_file() or path.suffix.lower() != ".jsonl":
        raise CalibrationError(f"{path} is no calibration data; give a .jsonl file, or a folder of pictures")
    return _read_jsonl(path)


class _Folder:
    """A folder whose files are named by untrusted data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = path.resolve()

    def file(self, name: str, where: str) -> Path:
        """Returns the file of that name.

        Args:
            name: A path relative to the folder.
            where: What names the file, to begin a message with.

        Raises:
            CalibrationError: The name leads out of the folder, or to no file.
        """
        path = self.path / name
        try:
            inside = path.resolve().is_relative_to(self._root)
            exists = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, a loop of links
            raise CalibrationError(f"{where}: {shown(name)} is no usable file name; rename the file") from error
        if not inside:
            raise CalibrationError(
                f"{where}: {shown(name)} leads out of the folder {self.path}; copy the file into that folder"
            )
        if not exists:
            raise CalibrationError(f"{where}: {self.path} has no file {shown(name)}; add it or correct the name")
        return path


def _read_folder(folder: _Folder) -> list[CalibrationItem]:
    # macOS leaves hidden `._a.jpg` beside `a.jpg` on foreign file systems: these are no pictures.
    names = sorted(entry.name for entry in folder.path.iterdir() if not entry.name.startswith("."))
    tables = [name for name in names if name.lower().endswith(".jsonl")]
    if len(tables) > 1:
        raise CalibrationError(
            f"{folder.path} holds {len(tables)} .jsonl files ({shown(', '.join(tables))}); give one of them"
        )
    if tables:
        return _read_jsonl(folder.file(tables[0], str(folder.path)))
    pictures = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not pictures:
        raise CalibrationError(
            f"{folder.path} holds neither a .jsonl file nor pictures ({', '.join(IMAGE_SUFFIXES)}); give another folder"
        )
    present = set(names)
    return [_read_picture(folder, name, present) for name in pictures]


def _read_picture(folder: _Folder, name: str, present: set[str]) -> CalibrationItem:
    image = folder.file(name, str(folder.path))
    text_name = Path(name).with_suffix(".txt").name
    if text_name not in present:
        return CalibrationItem((image,), DEFAULT_PROMPT, None)
    where = f"{folder.path / shown(text_name)}"
    with folder.file(text_name, str(folder.path)).open("rb") as file:
        prompt = _decode(file.read(_MAX_TEXT_BYTES + 1), where)
    return CalibrationItem((image,), _check_text(prompt.strip(), "the prompt", where), None)


def _read_jsonl(path: Path) -> list[CalibrationItem]:
    if path.stat().st_size > _MAX_JSONL_BYTES:
        raise CalibrationError(f"{path} is larger than {_MAX_JSONL_BYTES} bytes; give a part of it")
    folder = _Folder(path.parent)
    items = []
    with path.open("rb") as file:
        # readline allocates as it reads: a file of one endless line is not read whole.
        for number, line in enumerate(iter(lambda: file.readline(_MAX_TEXT_BYTES + 1), b""), start=1):
            where = f"{path.parent / shown(path.name)}, line {number}"
            if text := _decode(line, where).strip():
                items.append(_parse_line(text, folder, where))
    if not items:
        raise CalibrationError(f"{path} holds no prompt; give one JSON object per line")
    return items


def _parse_line(text: str, folder: _Folder, where: str) -> CalibrationItem:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{where} is not valid JSON ({error.msg}, column {error.colno}); each line must be one JSON object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{where} has a number of too many digits or is nested too deeply; remove that field"
        ) from error
    if not isinstance(record, dict):
        raise CalibrationError(f'{where} is not a JSON object; write {{"image": FILE, "prompt": TEXT}}')
    prompt_key = _only_key(record, ("prompt", "question"), where)
    image_key = _only_key(record, ("image", "images"), where)
    answer = record.get("answer")
    return CalibrationItem(
        images=tuple(folder.file(name, where) for name in _image_names(record[image_key], image_key, where)),
        prompt=_check_text(record[prompt_key], prompt_key, where),
        answer=None if answer is None else _check_text(answer, "answer", where),
    )


def _only_key(record: dict[str, Any], keys: tuple[str, str], where: str) -> str:
    present = [key for key in keys if key in record]
    if len(present) != 1:
        raise CalibrationError(f"{where} has {'both' if present else 'neither'} of {keys[0]} and {keys[1]}; give one")
    return present[0]


def _image_names(value: object, key: str, where: str) -> list[str]:
    names = [value] if key == "image" else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        kind = "a file name" if key == "image" else "a list of file names, at least one"
        raise CalibrationError(f"{where}: {key} must be {kind}")
    return names


def _decode(data: bytes, where: str) -> str:
    """Decodes UTF-8, with or without a byte order mark, that must not be longer than one text may be."""
    if len(data) > _MAX_TEXT_BYTES:
        raise CalibrationError(f"{where} is longer than {_MAX_TEXT_BYTES} bytes; shorten or remove it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error


def _check_text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: {what} must be text")
    if not value.strip():
        raise CalibrationError(f"{where}: {what} is empty; write one or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: `"\ud83d"`
        raise CalibrationError(f"{where}: {what} has a lone surrogate, which is no character; remove it") from error
    return value


def _digest(items: tuple[CalibrationItem, ...]) -> str:
    total = hashlib.sha256()
    of_file: dict[Path, str] = {}
    for item in items:
        for path in item.images:
            if path not in of_file:
                with path.open("rb") as file:
                    of_file[path] = hashlib.file_digest(file, "sha256").hexdigest()
        # JSON keeps the fields apart: no other prompt and answer run together to the same bytes.
        record = [[of_file[path] for path in item.images], item.prompt, item.answer]
        total.update(json.dumps(record).encode() + b"\n")
    return total.hexdigest()
