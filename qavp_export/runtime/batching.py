"""Several prompts in one batch: left padding, masks and position ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qavp_export.engines import FloatArray, IntArray
from qavp_export.errors import PromptError
from qavp_export.manifest import DecoderSpec, VisionTokens


@dataclass(frozen=True)
class Prepared:
    """Prompts and images, ready for the decoder.

    Attributes:
        input_ids: Left-padded ids with k placeholders for each image `[B, S]`.
        attention_mask: 1 for a token, 0 for padding `[B, S]`.
        position_ids: Position of each token, 0 for padding `[B, S]`.
        next_positions: Position of the first token of each answer `[B]`.
        inputs_embeds: Embedded prompts `[B, S, D]`.
        kept_indices: Raster positions of each image's surviving tokens, images in prompt order `[I, k]`.
        images_per_prompt: Number of images of each prompt; their sum is I.
    """

    input_ids: IntArray
    attention_mask: IntArray
    position_ids: IntArray
    next_positions: IntArray
    inputs_embeds: FloatArray
    kept_indices: IntArray
    images_per_prompt: tuple[int, ...]


@dataclass(frozen=True)
class PaddedPrompts:
    """Left-padded ids, mask and positions; the fields of the same names in `Prepared`."""

    input_ids: IntArray
    attention_mask: IntArray
    position_ids: IntArray
    next_positions: IntArray


def number_positions(ids: IntArray, kept: IntArray, tokens: VisionTokens) -> tuple[IntArray, int]:
    """Numbers the positions of one prompt.

    `contiguous` counts the tokens that are there. `original` gives each token the position that it has in the
    unpruned prompt, where every image takes `before` positions.

    Args:
        ids: The prompt `[S]`, each image k adjacent placeholders.
        kept: Raster positions of the prompt's images `[I, k]`.
        tokens: The manifest's vision tokens.

    Returns:
        Positions `[S]` and the position that follows the last token.
    """
    if tokens.positions == "contiguous":
        return np.arange(len(ids), dtype=np.int64), len(ids)
    is_image = ids == tokens.image_token_id
    texts_before = np.cumsum(~is_image) - ~is_image
    images_before = (np.cumsum(is_image) - is_image) // tokens.after
    positions = texts_before + images_before * tokens.before
    positions[is_image] += kept.reshape(-1)
    return positions.astype(np.int64), int((~is_image).sum()) + len(kept) * tokens.before


def pad_prompts(
    prompts: Sequence[IntArray],
    kept_indices: IntArray,
    images_per_prompt: Sequence[int],
    tokens: VisionTokens,
    decoder: DecoderSpec,
) -> PaddedPrompts:
    """Pads prompts on the left to the longest of them.

    Args:
        prompts: Ids of each prompt.
        kept_indices: Raster positions of all images in prompt order `[I, k]`.
        images_per_prompt: Images of each prompt.
        tokens: The manifest's vision tokens.
        decoder: The manifest's decoder.

    Raises:
        PromptError: A prompt leaves no room for an answer in the context.
    """
    shape = (len(prompts), max(len(ids) for ids in prompts))
    input_ids = np.full(shape, decoder.pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    following = np.zeros(len(prompts), dtype=np.int64)
    first_image = 0
    for row, (ids, images) in enumerate(zip(prompts, images_per_prompt, strict=True)):
        kept = kept_indices[first_image : first_image + images]
        first_image += images
        numbered, following[row] = number_positions(ids, kept, tokens)
        input_ids[row, -len(ids) :] = ids
        mask[row, -len(ids) :] = 1
        positions[row, -len(ids) :] = numbered
    return PaddedPrompts(input_ids, mask, positions, following)


def check_context(prompts: Sequence[IntArray], tokens: VisionTokens, decoder: DecoderSpec) -> None:
    """Checks that every prompt leaves room for at least one token of an answer.

    Under original positions an image takes its unpruned number of positions, and these are what counts.

    Raises:
        PromptError: One does not.
    """
    for row, ids in enumerate(prompts):
        placeholders = int((ids == tokens.image_token_id).sum())
        length = len(ids)
        unit = "tokens"
        if tokens.positions != "contiguous":
            length += placeholders // tokens.after * (tokens.before - tokens.after)
            unit = "positions"
        if length >= decoder.context_length:
            which = f"prompt {row + 1}" if len(prompts) > 1 else "the prompt"
            raise PromptError(
                f"{which} has {length} {unit} ({placeholders} of its tokens for images) and the context "
                f"holds {decoder.context_length}, answer included; shorten the text or give fewer images"
            )
