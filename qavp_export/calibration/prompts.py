"""Calibration prompts as the decoder will see them: embedded, with the image tokens that survive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qavp_export.calibration.data import CalibrationItem
from qavp_export.engines import TOKEN_TYPES, EngineOptions
from qavp_export.engines.ort.encoders import OrtEmbedding, OrtEncoders
from qavp_export.errors import CalibrationError, ImageError, PromptError
from qavp_export.manifest import DecoderSpec, Manifest
from qavp_export.runtime.preparation import Preparer

Array = npt.NDArray[Any]

# Optimized, ONNX Runtime would copy 16-bit weights to float32; as they are, they stay mapped from the file.
OPTIONS = EngineOptions(graph_optimization="disable")


def embed_prompts(
    bundle: Path, manifest: Manifest, items: tuple[CalibrationItem, ...], *, token_types: bool = False
) -> Iterator[dict[str, Array]]:
    """Runs vision encoder and embedding on each prompt, answer included.

    Args:
        bundle: The folder with both graphs, tokenizer and processor.
        manifest: What is known of the bundle.
        items: The prompts. The checkpoint's chat template wraps them if it has one.
        token_types: Whether the decoder takes `token_type_ids`.

    Yields:
        The decoder's inputs with an empty cache, batch size 1.

    Raises:
        CalibrationError: A picture cannot be read, or a prompt does not fit the context; the message names it.
    """
    preparer = Preparer(bundle, manifest, OrtEncoders(bundle, manifest, OPTIONS))
    cache = empty_cache(manifest.decoder, 1)
    for item in items:
        prompt, answer = written(item, preparer.image_token, templated=preparer.has_chat_template)
        with naming(item):
            prepared = preparer.prepare(
                [prompt], [list(item.images)], chat_template=preparer.has_chat_template, answers=[answer]
            )
        yield {
            "inputs_embeds": prepared.inputs_embeds,
            "attention_mask": prepared.attention_mask,
            "position_ids": prepared.position_ids,
            **({TOKEN_TYPES: prepared.token_type_ids} if token_types else {}),
            **cache,
        }


def written(item: CalibrationItem, image_token: str, *, templated: bool) -> tuple[str, str]:
    """Returns prompt and answer of an item as the processor reads them.

    Args:
        item: The item.
        image_token: What stands for an image in a prompt without a chat template.
        templated: Whether the checkpoint's chat template wraps the prompt.
    """
    images = "" if templated else f"{image_token}\n" * len(item.images)
    return images + item.prompt, f" {item.answer}" if item.answer else ""


@contextmanager
def naming(item: CalibrationItem) -> Iterator[None]:
    """Lets errors say which calibration prompt they are about.

    Raises:
        CalibrationError: In the place of an error of its images or its text.
    """
    try:
        yield
    except (CalibrationError, ImageError, PromptError) as error:
        shows = ", ".join(path.name for path in item.images)
        raise CalibrationError(f"calibration prompt about {shows}: {error}") from error


def embed_text(
    bundle: Path, manifest: Manifest, token_ids: npt.NDArray[np.int64], *, token_types: bool = False
) -> dict[str, Array]:
    """Embeds sequences of text tokens.

    Args:
        bundle: The folder with the embedding's graph.
        manifest: What is known of the bundle.
        token_ids: `[B,S]`, no image placeholder among them.
        token_types: Whether the decoder takes `token_type_ids`.

    Returns:
        The decoder's inputs with an empty cache.
    """
    no_images = np.zeros((0, manifest.vision_tokens.after or 1, manifest.decoder.hidden_size), np.float32)
    embeds = OrtEmbedding(bundle, manifest, OPTIONS).embed(token_ids, no_images)
    positions = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
    mask = np.ones_like(token_ids)
    inputs: dict[str, Array] = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    if token_types:
        inputs[TOKEN_TYPES] = np.zeros_like(token_ids)
    return inputs | empty_cache(manifest.decoder, len(token_ids))


def empty_cache(spec: DecoderSpec, batch: int) -> dict[str, Array]:
    """Returns the decoder's inputs for keys and values of sequences that begin."""
    empty = np.zeros((batch, spec.num_key_value_heads, 0, spec.head_dim), np.float32)
    return {f"past_key_values.{layer}.{part}": empty for layer in range(spec.num_layers) for part in ("key", "value")}
