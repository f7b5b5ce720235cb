"""What engines that hold a whole batch's keys and values share: how sequences are padded and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qavp_export.engines import FloatArray, IntArray
from qavp_export.errors import InputError, PromptError

Array = NDArray[Any]

# Capacities are multiples of this.
_STEP = 64


def check_placeholders(input_ids: IntArray, image_features: FloatArray, image_token_id: int) -> None:
    """Checks what `Encoders.embed` is given.

    Args:
        input_ids: Token ids `[B, S]`.
        image_features: What is put at their placeholders `[U, k, D]`.
        image_token_id: The id of a placeholder.

    Raises:
        PromptError: The number of placeholders is not that of the features.
    """
    placeholders = int(np.count_nonzero(input_ids == image_token_id))
    features = image_features.shape[0] * image_features.shape[1]
    if placeholders != features:
        raise PromptError(
            f"the prompts have {placeholders} image placeholders and the images {features} features; "
            "give each image as many placeholders as it has tokens"
        )


def cache_names(num_layers: int) -> tuple[list[str], list[str]]:
    """Returns the inputs and outputs of a decoder that hold keys and values."""
    kinds = [f"{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
    return [f"past_key_values.{kind}" for kind in kinds], [f"present.{kind}" for kind in kinds]


def scale_names(past: Sequence[str]) -> list[str]:
    """Returns the inputs that hold the scales of keys and values in 8-bit codes, from those that hold these."""
    return [name.replace("past_key_values", "cache_scales") for name in past]


def whole_steps(tokens: int) -> int:
    """Returns the capacity that holds so many tokens."""
    return -(-tokens // _STEP) * _STEP


def lengths_of(attention_mask: IntArray) -> IntArray:
    """Returns the tokens of each sequence `[B]` of a mask `[B,S]`.

    Raises:
        InputError: A sequence has padding elsewhere than in front of it.
    """
    lengths: IntArray = attention_mask.sum(axis=1)
    columns = np.arange(attention_mask.shape[1])
    padded = columns[None, :] < (attention_mask.shape[1] - lengths)[:, None]
    if not np.array_equal(attention_mask == 0, padded) or not lengths.all():
        raise InputError("attention_mask has padding behind or inside a sequence; pad on the left only")
    return lengths


def last_positions(lengths: IntArray, longest: int, keep: int) -> IntArray:
    """Returns where, with the padding on the right, the last `keep` columns of a batch padded on the left are `[B,R]`.

    Args:
        lengths: Tokens of each sequence `[B]`.
        longest: Columns of the batch.
        keep: How many are wanted; 0: all.
    """
    columns = np.arange(longest - min(keep or longest, longest), longest)
    # Column c of a sequence padded on the left is token c - padding of it.
    found: IntArray = np.maximum(columns[None, :] - (longest - lengths)[:, None], 0).astype(np.int64)
    return found


def to_right(array: Array, lengths: IntArray, columns: int = 0) -> Array:
    """Moves the padding of `[B,S,...]` from the left to the right, and adds to it up to so many columns."""
    longest = array.shape[1]
    columns = max(columns, longest)
    if columns == longest and (lengths == longest).all():
        return array
    moved = np.zeros((len(array), columns, *array.shape[2:]), array.dtype)
    for row, length in enumerate(lengths):
        moved[row, :length] = array[row, longest - length :]
    return moved
