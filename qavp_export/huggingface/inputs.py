"""From a batch as a transformers processor returns it to the runtime's prompts, each with its own images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qavp_export.engines import IntArray
from qavp_export.errors import PromptError
from qavp_export.manifest import VisionTokens
from qavp_export.runtime.prompts import EncodedPrompt
from qavp_export.runtime.tiles import count_tiles, pack_tiles

IMAGE_INPUTS = frozenset({"pixel_values", "image_sizes", "batch_num_images"})
"""What processors say of images."""

UNREAD_INPUTS = frozenset({"pixel_attention_mask", "token_type_ids", "mm_token_type_ids", "labels"})
"""What some processors return besides: the placeholders and the manifest say it too."""

_Image = tuple[int, dict[str, Any]]
"""The number of an image's (or tile's) placeholders, and what the runtime's layout reads of it."""


def split_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    images: Mapping[str, Any],
    tokens: VisionTokens,
) -> list[EncodedPrompt]:
    """Splits a batch into prompts; images go to prompts in order, each to the next free placeholders.

    Args:
        input_ids: Prompts `[B, S]` with the placeholders that the processor wrote.
        attention_mask: 1 for a token, 0 for padding `[B, S]`; None: no padding.
        images: What the processor made of the images, by the names in `IMAGE_INPUTS`.
        tokens: The manifest's vision tokens.

    Raises:
        PromptError: A prompt is empty, the mask does not fit, or the placeholders are not those of the images.
    """
    ids: IntArray = input_ids.numpy(force=True).astype(np.int64)
    mask = np.ones_like(ids) if attention_mask is None else attention_mask.numpy(force=True)
    if mask.shape != ids.shape:
        raise PromptError(
            f"attention_mask has shape {list(mask.shape)} and input_ids {list(ids.shape)}; pass both alike"
        )
    prompts = [row[seen != 0] for row, seen in zip(ids, mask, strict=True)]
    counts = [int(np.count_nonzero(prompt == tokens.image_token_id)) for prompt in prompts]
    found: Iterator[_Image] = iter(())
    if images.get("pixel_values") is not None:
        arrays = {name: _to_numpy(value) for name, value in images.items() if value is not None}
        found = _SPLITTERS[tokens.layout](arrays, counts, tokens)
    encoded = [
        _take(prompt, count, found, row) for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    if left := sum(1 for _ in found):
        raise PromptError(f"the prompts have no placeholders for {left} image(s) or tile(s); see AutoProcessor")
    return encoded


def _take(prompt: IntArray, placeholders: int, images: Iterator[_Image], row: int) -> EncodedPrompt:
    """Gives a prompt the images that its placeholders stand for."""
    if not len(prompt):
        raise PromptError(f"prompt {row + 1} is empty, or its attention mask is all 0; write a question")
    parts: list[dict[str, Any]] = []
    missing = placeholders
    while missing > 0:
        span, image = next(images, (0, {}))
        if not 0 < span <= missing:
            raise PromptError(
                f"prompt {row + 1} has {placeholders} image placeholders, which are not those of its images; "
                "pass input_ids and pixel_values as the bundle's AutoProcessor returns them"
            )
        missing -= span
        parts.append(image)
    together = {name: [part[name] for part in parts] for name in (parts[0] if parts else {})}
    labels = tuple(f"{number + 1} of prompt {row + 1}" for number in range(len(parts)))
    return EncodedPrompt(prompt, together, labels)


def _grid(arrays: Mapping[str, Any], counts: Sequence[int], tokens: VisionTokens) -> Iterator[_Image]:
    """Every tile has as many placeholders as any other; where a row has fewer tiles than others, it is padded."""
    pixels = arrays["pixel_values"]
    span = tokens.before or 0
    if pixels.ndim == 5:
        tiles = [tile for row, count in zip(pixels, counts, strict=False) for tile in row[: count // max(span, 1)]]
    else:
        tiles = list(pixels)
    for tile in tiles:
        yield span, {"pixel_values": tile}


def _tiles(arrays: Mapping[str, Any], _: Sequence[int], tokens: VisionTokens) -> Iterator[_Image]:
    """Images have their own number of tiles, of which those that share a prompt may use the first alone."""
    sizes = [(int(height), int(width)) for height, width in arrays["image_sizes"]]
    together = arrays.get("batch_num_images", np.ones(len(sizes), np.int64)).reshape(-1)
    alone = np.repeat(together == 1, together)
    settings = tokens.layout_settings
    for pixels, size, whole in zip(arrays["pixel_values"], sizes, alone, strict=True):
        tiles = count_tiles(size, settings) if whole else 1
        span = len(pack_tiles(size, settings, newlines=True, tiles=tiles)["token_indices"])
        yield span, {"pixel_values": pixels[:tiles], "image_sizes": size}


def _native(arrays: Mapping[str, Any], _: Sequence[int], tokens: VisionTokens) -> Iterator[_Image]:
    """Images have their own size, and are padded to the largest at the bottom and on the right."""
    settings = tokens.layout_settings
    cell = int(settings["patch_size"]) * int(settings["spatial_merge_size"])
    for pixels, (height, width) in zip(arrays["pixel_values"], arrays["image_sizes"], strict=True):
        yield (height // cell) * (width // cell), {"pixel_values": pixels[:, :height, :width]}


_SPLITTERS: Mapping[str, Callable[[Mapping[str, Any], Sequence[int], VisionTokens], Iterator[_Image]]] = (
    MappingProxyType({"grid": _grid, "tiles": _tiles, "native": _native})
)


def _to_numpy(value: Any) -> NDArray[Any]:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    # NumPy has no bfloat16.
    return (value.float() if value.is_floating_point() else value).numpy(force=True)
