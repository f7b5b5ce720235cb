"""From unpruned prompts to one batch: placeholders that go, position ids, left padding and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qavp_export.engines import FloatArray, IntArray
from qavp_export.errors import PromptError
from qavp_export.manifest import Manifest, VisionTokens
from qavp_export.runtime.layouts import Unit


@dataclass(frozen=True)
class Prepared:
    """Prompts and images, ready for the decoder.

    A unit is what one selection of k of N tokens was made from: an image, one of its tiles, or all of its tiles, as the
    manifest's `vision_tokens.unit` says.

    Attributes:
        input_ids: Left-padded ids with a placeholder for each surviving vision token `[B, S]`.
        attention_mask: 1 for a token, 0 for padding `[B, S]`.
        position_ids: Position of each token, 0 for padding `[B, S]`.
        token_type_ids: 1 for a vision token, 0 for others `[B, S]`; read by decoders that list it as an input.
        next_positions: Position of the first token of each answer `[B]`.
        inputs_embeds: Embedded prompts `[B, S, D]`.
        kept_indices: For each unit, in prompt order, which of its N tokens survive `[k]`, ascending.
        unpruned_tokens: N of each unit.
        images_per_prompt: Number of images of each prompt.
    """

    input_ids: IntArray
    attention_mask: IntArray
    position_ids: IntArray
    token_type_ids: IntArray
    next_positions: IntArray
    inputs_embeds: FloatArray
    kept_indices: tuple[IntArray, ...]
    unpruned_tokens: tuple[int, ...]
    images_per_prompt: tuple[int, ...]


@dataclass(frozen=True)
class PrunedPrompt:
    """One prompt without the vision tokens that did not survive.

    Attributes:
        input_ids: `[S]`.
        positions: Position of each token `[S]`.
        next_position: The position that follows the last token.
    """

    input_ids: IntArray
    positions: IntArray
    next_position: int


@dataclass(frozen=True)
class PaddedPrompts:
    """Left-padded ids, mask and positions; the fields of the same names in `Prepared`."""

    input_ids: IntArray
    attention_mask: IntArray
    position_ids: IntArray
    next_positions: IntArray


def prune_prompt(ids: IntArray, units: Sequence[Unit], kept: Sequence[IntArray], tokens: VisionTokens) -> PrunedPrompt:
    """Removes the placeholders of the vision tokens that did not survive.

    A token between the rows of an image goes with the last token of its row. Positions: `contiguous` counts the
    tokens that are there, `original` gives each token the position that it has in the unpruned prompt.

    Args:
        ids: The unpruned prompt `[S]`.
        units: The prompt's units.
        kept: Which tokens of each unit survive `[k]`.
        tokens: The manifest's vision tokens.
    """
    is_image = ids == tokens.image_token_id
    places = np.flatnonzero(is_image)
    stays = ~is_image
    row_break = tokens.layout_settings.get("row_break_token_id")
    start = 0
    for unit, chosen in zip(units, kept, strict=True):
        span = places[start : start + unit.span]
        start += unit.span
        stays[span[unit.candidates[chosen]]] = True
        if unit.columns is not None and row_break is not None:
            rows = span.reshape(-1, unit.columns)
            after = rows[~stays[rows].any(axis=1), -1] + 1
            # The last row ends with another token, which tells where the image does.
            stays[after[ids[after] == row_break]] = False
    remaining = np.flatnonzero(stays)
    if tokens.positions == "original":
        return PrunedPrompt(ids[remaining], remaining, len(ids))
    return PrunedPrompt(ids[remaining], np.arange(len(remaining), dtype=np.int64), len(remaining))


def pad_prompts(prompts: Sequence[PrunedPrompt], pad_token_id: int) -> PaddedPrompts:
    """Pads prompts on the left to the longest of them."""
    shape = (len(prompts), max(len(prompt.input_ids) for prompt in prompts))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        length = len(prompt.input_ids)
        input_ids[row, -length:] = prompt.input_ids
        mask[row, -length:] = 1
        positions[row, -length:] = prompt.positions
    following = np.array([prompt.next_position for prompt in prompts], dtype=np.int64)
    return PaddedPrompts(input_ids, mask, positions, following)


def shortest_length(ids: IntArray, units: Sequence[Unit], tokens: VisionTokens) -> int:
    """Returns the least number of positions that a prompt can take, known before its images are encoded.

    Under original positions an image takes its unpruned number.

    Args:
        ids: The unpruned prompt `[S]`.
        units: Its units.
        tokens: The manifest's vision tokens.
    """
    if tokens.positions == "original":
        return len(ids)
    row_breaks = int(np.count_nonzero(ids == tokens.layout_settings.get("row_break_token_id", -1)))
    return len(ids) - row_breaks - sum(unit.span - unit.kept for unit in units)


def check_context(lengths: Sequence[int], units: Sequence[Sequence[Unit]], manifest: Manifest) -> None:
    """Checks that every prompt leaves room for at least one token of an answer.

    Args:
        lengths: Positions of each prompt.
        units: The units of each prompt.
        manifest: The bundle's manifest.

    Raises:
        PromptError: One does not.
    """
    limit = manifest.decoder.context_length
    unit_name = "tokens" if manifest.vision_tokens.positions == "contiguous" else "positions"
    for row, (length, shown) in enumerate(zip(lengths, units, strict=True)):
        if length >= limit:
            which = f"prompt {row + 1}" if len(lengths) > 1 else "the prompt"
            kept = sum(unit.kept for unit in shown)
            raise PromptError(
                f"{which} has {length} {unit_name} ({kept} of its tokens for images) and the context "
                f"holds {limit}, answer included; shorten the text or give fewer images"
            )
