"""How a prompt's images become units, the selections of k of N tokens each, and calls of the vision encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qavp_export.engines import FloatArray, IntArray
from qavp_export.errors import BundleError, ImageError, InputError, PromptError
from qavp_export.manifest import Manifest, VisionTokens
from qavp_export.numerics.select import tokens_to_keep
from qavp_export.runtime.prompts import EncodedPrompt
from qavp_export.runtime.question import TEXT_INPUT_IDS, pad_questions
from qavp_export.runtime.tiles import pack_tiles

Array = npt.NDArray[Any]

_KEEP_TOKENS = "keep_tokens"


@dataclass(frozen=True)
class Unit:
    """One selection.

    Attributes:
        pixel_values: `[3,H,W]`, or `[tiles,3,H,W]` where the tiles of an image are one unit.
        inputs: What the vision encoder takes for this unit beyond its pixels, its question and `keep_tokens`.
        span: Its placeholders in the unpruned prompt.
        candidates: Which of these each of its N tokens belongs to, ascending `[N]`.
        kept: How many of the tokens survive (k).
        columns: Tokens of each row where the prompt has a token between rows; None elsewhere.
        question: The question of its prompt in CLIP's tokens `[L]`, where the vision encoder reads it.
    """

    pixel_values: Array
    inputs: Mapping[str, Array]
    span: int
    candidates: IntArray
    kept: int
    columns: int | None = None
    question: IntArray | None = None


class Layout(ABC):
    """One way to make units of images.

    Attributes:
        image_options: What the image processor is told beyond its settings.
    """

    image_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, manifest: Manifest) -> None:
        """Reads what the vision encoder takes.

        Raises:
            BundleError: The manifest does not describe a vision encoder.
        """
        component = manifest.components.get("vision_encoder")
        shapes = {spec.name: spec.shape for spec in component.inputs} if component else {}
        if "pixel_values" not in shapes or len(shapes["pixel_values"]) != 4:
            raise BundleError(
                "the manifest gives no pixel_values with 4 axes for the vision_encoder; export the bundle again"
            )
        self.tokens = manifest.vision_tokens
        self.pixel_shape = shapes["pixel_values"]
        self._chosen_at_run_time = _KEEP_TOKENS in shapes

    def units(self, prompt: EncodedPrompt, keep: float) -> list[Unit]:
        """Returns the units of one prompt, in the order of their placeholders.

        Args:
            prompt: What the processor made of it.
            keep: The share of tokens that survives, where the graph takes it.

        Raises:
            ImageError: An image does not give pixel values of the encoder's shape.
            BundleError: The processor wrote another number of placeholders than the vision encoder yields tokens.
        """
        units = list(self.split(prompt, keep)) if prompt.labels else []
        placeholders = int(np.count_nonzero(prompt.input_ids == self.tokens.image_token_id))
        expected = sum(unit.span for unit in units)
        if placeholders != expected:
            raise BundleError(
                f"the checkpoint's processor writes {placeholders} image tokens where the vision encoder yields "
                f"{expected}; its files (processor_config.json) do not fit the model"
            )
        return units

    @abstractmethod
    def split(self, prompt: EncodedPrompt, keep: float) -> Iterator[Unit]:
        """Yields the units of a prompt that has images."""

    def calls(self, units: Sequence[Unit]) -> Iterator[dict[str, Array]]:
        """Yields the vision encoder's inputs, call by call: one for each unit."""
        for unit in units:
            pixels = unit.pixel_values if unit.pixel_values.ndim == 4 else unit.pixel_values[np.newaxis]
            yield {"pixel_values": pixels, **unit.inputs, **self.budget(unit)}

    def budget(self, unit: Unit) -> dict[str, Array]:
        """Returns `keep_tokens [1]` if the graph takes it."""
        return {_KEEP_TOKENS: np.array([unit.kept], np.int64)} if self._chosen_at_run_time else {}

    def kept(self, candidates: int, keep: float) -> int:
        """Returns k for a unit of N = `candidates` tokens."""
        if self._chosen_at_run_time:
            return tokens_to_keep(candidates, keep)
        return candidates if self.tokens.after is None else self.tokens.after

    def check(self, pixels: Array, label: str) -> Array:
        """Returns pixel values whose last three axes are the encoder's, where those are fixed.

        Raises:
            ImageError: They are not.
        """
        sizes = zip(pixels.shape[-3:], self.pixel_shape[1:], strict=True)
        if any(isinstance(wanted, int) and found != wanted for found, wanted in sizes):
            _, height, width = self.pixel_shape[1:]
            raise ImageError(
                f"image {label} gives pixel values of shape {list(pixels.shape)}, the bundle takes "
                f"{self.pixel_shape}; resize the image to {width}x{height}"
            )
        return pixels


class GridLayout(Layout):
    """Every tile is a unit of the same N tokens, and all tiles of a batch go through the encoder at once."""

    def __init__(self, manifest: Manifest) -> None:
        """Checks that the grid is fixed; see `Layout`."""
        super().__init__(manifest)
        if self.tokens.before is None or not all(isinstance(size, int) for size in self.pixel_shape[1:]):
            raise BundleError(
                "the manifest gives no fixed image size (vision_encoder, pixel_values [B,3,H,W]) and number of tokens; "
                "export the bundle again"
            )
        self._candidates = np.arange(self.tokens.before, dtype=np.int64)

    def split(self, prompt: EncodedPrompt, keep: float) -> Iterator[Unit]:
        """See `Layout.split`."""
        if self.tokens.question is not None and prompt.question is None:
            raise PromptError(
                "the bundle selects image tokens by the question, which token ids do not tell; give QavpModel the "
                "prompt as text"
            )
        tiles = list(_arrays(prompt.images["pixel_values"], 3))
        count = len(self._candidates)
        kept = self.kept(count, keep)
        all_images = ", ".join(prompt.labels)
        for index, pixels in enumerate(tiles):
            label = prompt.labels[index] if len(tiles) == len(prompt.labels) else all_images
            yield Unit(self.check(pixels, label), {}, count, self._candidates, kept, question=prompt.question)

    def calls(self, units: Sequence[Unit]) -> Iterator[dict[str, Array]]:
        """See `Layout.calls`; a single call."""
        if units:
            pixels: FloatArray = np.empty((len(units), *units[0].pixel_values.shape), np.float32)
            for index, unit in enumerate(units):
                pixels[index] = unit.pixel_values
            yield {"pixel_values": pixels, **self._questions(units), **self.budget(units[0])}

    def _questions(self, units: Sequence[Unit]) -> dict[str, Array]:
        """Returns `text_input_ids [I,L]` if the graph takes them: each image has its prompt's question."""
        found = [unit.question for unit in units if unit.question is not None]
        if self.tokens.question is None or not found:
            return {}
        return {TEXT_INPUT_IDS: pad_questions(found, self.tokens.question.eos_token_id)}


class TilesLayout(Layout):
    """The tiles of one image are packed into one sequence, which is a unit."""

    # Else every image would get as many tiles as the one that has the most.
    image_options = MappingProxyType({"do_pad": False})

    def split(self, prompt: EncodedPrompt, keep: float) -> Iterator[Unit]:
        """See `Layout.split`."""
        images = _arrays(prompt.images["pixel_values"], 4)
        sizes = prompt.images["image_sizes"]
        for pixels, (height, width), label in zip(images, sizes, prompt.labels, strict=True):
            yield self._pack(self.check(pixels, label), (int(height), int(width)), keep)

    def _pack(self, pixels: Array, image_size: tuple[int, int], keep: float) -> Unit:
        settings = self.tokens.layout_settings
        tiles = len(pixels)
        packed = pack_tiles(image_size, settings, newlines=True, tiles=tiles)
        indices = packed["token_indices"]
        span = len(indices)
        candidates = np.arange(span, dtype=np.int64)
        if self.tokens.newlines == "dropped":
            newline = tiles * settings["tile_patches"] ** 2
            candidates = np.flatnonzero(indices.reshape(span, -1)[:, 0] != newline)
            packed = {name: values[candidates] for name, values in packed.items()}
        return Unit(pixels, packed, span, candidates, self.kept(len(candidates), keep))


class NativeLayout(Layout):
    """An image in its own resolution is a unit."""

    # Else every image would be as large as the largest.
    image_options = MappingProxyType({"do_pad": False})

    def split(self, prompt: EncodedPrompt, keep: float) -> Iterator[Unit]:
        """See `Layout.split`."""
        settings = self.tokens.layout_settings
        cell = settings["patch_size"] * settings["spatial_merge_size"]
        images = _arrays(prompt.images["pixel_values"], 3)
        for pixels, label in zip(images, prompt.labels, strict=True):
            rows, columns = pixels.shape[1] // cell, pixels.shape[2] // cell
            count = rows * columns
            kept = self.kept(count, keep)
            yield Unit(self.check(pixels, label), {}, count, np.arange(count, dtype=np.int64), kept, columns)


_LAYOUTS: Mapping[str, type[Layout]] = MappingProxyType(
    {"grid": GridLayout, "tiles": TilesLayout, "native": NativeLayout}
)


def load_layout(manifest: Manifest) -> Layout:
    """Returns the layout that the manifest names.

    Raises:
        BundleError: It names none that is known, or lacks what the layout needs.
    """
    kind = _LAYOUTS.get(manifest.vision_tokens.layout)
    if kind is None:
        raise BundleError(
            f"the bundle's image layout {manifest.vision_tokens.layout!r} is not one of {', '.join(_LAYOUTS)}; "
            "use the version of qavp-export that wrote it"
        )
    return kind(manifest)


def choose_keep(tokens: VisionTokens, keep: float | None) -> float:
    """Returns the share of tokens that survives.

    Args:
        tokens: The manifest's vision tokens.
        keep: What the caller asks for; None for the bundle's default.

    Raises:
        InputError: The bundle does not serve it.
    """
    if keep is None:
        return tokens.keep
    if tokens.keep_range is None:
        raise InputError(
            f"the bundle keeps {tokens.keep:g} of the vision tokens and no other share; leave keep out, or export with "
            "--keep LOW:HIGH to choose at run time"
        )
    low, high = tokens.keep_range
    if not low <= keep <= high:
        raise InputError(f"keep is {keep}; the bundle serves {low:g} to {high:g}")
    return keep


def _arrays(values: Any, axes: int) -> Iterator[Array]:
    """Yields the arrays of `axes` axes in an array of more, or in nested lists of arrays."""
    if isinstance(values, np.ndarray) and values.ndim == axes:
        yield values
    else:
        for part in values:
            yield from _arrays(part, axes)
