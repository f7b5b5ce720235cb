"""From prompts and images to what the decoder reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from qavp_export.engines import Encoders, FloatArray, IntArray
from qavp_export.manifest import Manifest
from qavp_export.runtime.batching import (
    Prepared,
    PrunedPrompt,
    check_context,
    pad_prompts,
    prune_prompt,
    shortest_length,
)
from qavp_export.runtime.images import ImageSource
from qavp_export.runtime.layouts import Unit, choose_keep, load_layout
from qavp_export.runtime.processors import load_processor
from qavp_export.runtime.prompts import EncodedPrompt, PromptEncoder
from qavp_export.runtime.question import load_question_encoder


class Preparer:
    """Everything that comes before the decoder.

    Args:
        bundle: Folder with tokenizer and processor files.
        manifest: The bundle's manifest; of the decoder only its sizes are read.
        encoders: What runs the vision encoder and the embedding.

    Attributes:
        tokenizer: The transformers tokenizer.
        has_chat_template: Whether the checkpoint brings a chat template.
        image_token: What stands for an image in a prompt that is written without the chat template.
    """

    def __init__(self, bundle: Path, manifest: Manifest, encoders: Encoders) -> None:
        self._manifest = manifest
        self._encoders = encoders
        self._layout = load_layout(manifest)
        processor = load_processor(bundle)
        self.tokenizer = processor.tokenizer
        question = load_question_encoder(bundle, manifest)
        self._encoder = PromptEncoder(processor, manifest.vision_tokens, self._layout.image_options, question)
        self.has_chat_template = self._encoder.chat_template is not None
        self.image_token = self._encoder.image_token

    def prepare(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageSource]],
        *,
        chat_template: bool,
        answers: Sequence[str] | None = None,
        keep: float | None = None,
    ) -> Prepared:
        """Encodes a batch; see `Prepared` for what it yields.

        Args:
            prompts: The prompts.
            images: The images of each prompt.
            chat_template: Whether to wrap the text in the checkpoint's chat template, images first. Without it a prompt
                is used as it is and holds the image token once where each image goes.
            answers: What follows each prompt; None for nothing.
            keep: The share of vision tokens that survives; None for the bundle's default.

        Raises:
            PromptError: A prompt does not match its images or does not fit the context.
            ImageError: An image cannot be read.
            InputError: The bundle does not serve `keep`.
        """
        encoded = [
            self._encoder.encode(prompt, sources, chat_template, answer)
            for prompt, sources, answer in zip(prompts, images, answers or [""] * len(prompts), strict=True)
        ]
        return self.prepare_encoded(encoded, keep)

    def prepare_encoded(self, encoded: Sequence[EncodedPrompt], keep: float | None = None) -> Prepared:
        """Does what follows the processor: encodes images, removes the placeholders of pruned tokens, pads and embeds.

        Args:
            encoded: What the checkpoint's processor makes of each prompt.
            keep: See `prepare`.

        Raises:
            PromptError: A prompt does not fit the context.
            ImageError: An image does not give pixel values of the encoder's shape.
            InputError: The bundle does not serve `keep`.
        """
        tokens = self._manifest.vision_tokens
        share = choose_keep(tokens, keep)
        units = [self._layout.units(prompt, share) for prompt in encoded]
        # Known before the images are encoded, but for tokens between rows, which may go with their row.
        check_context(
            [shortest_length(prompt.input_ids, shown, tokens) for prompt, shown in zip(encoded, units, strict=True)],
            units,
            self._manifest,
        )
        flat = [unit for shown in units for unit in shown]
        features, kept = self._select(flat)
        remaining = iter(kept)
        pruned = [
            prune_prompt(prompt.input_ids, shown, [next(remaining) for _ in shown], tokens)
            for prompt, shown in zip(encoded, units, strict=True)
        ]
        check_context([prompt.next_position for prompt in pruned], units, self._manifest)
        return embed_pruned(
            pruned,
            features,
            self._manifest,
            self._encoders,
            kept_indices=kept,
            unpruned_tokens=tuple(len(unit.candidates) for unit in flat),
            images_per_prompt=tuple(len(prompt.labels) for prompt in encoded),
        )

    def _select(self, units: Sequence[Unit]) -> tuple[FloatArray, tuple[IntArray, ...]]:
        """Runs the vision encoder.

        Returns:
            The surviving tokens `[I, k, D]`, or `[1, sum of k, D]` where each unit has a call of its own, and which
            tokens of each unit survived.
        """
        found = [self._encoders.encode_images(inputs) for inputs in self._layout.calls(units)]
        kept = tuple(indices for _, rows in found for indices in rows)
        return _join([features for features, _ in found], self._manifest), kept


def _join(features: Iterable[FloatArray], manifest: Manifest) -> FloatArray:
    parts = list(features)
    width = manifest.decoder.hidden_size
    if not parts:
        return np.zeros((0, manifest.vision_tokens.after or 1, width), np.float32)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part.reshape(1, -1, width) for part in parts], axis=1)


def embed_pruned(
    pruned: Sequence[PrunedPrompt],
    features: FloatArray,
    manifest: Manifest,
    encoders: Encoders,
    *,
    kept_indices: tuple[IntArray, ...],
    unpruned_tokens: tuple[int, ...],
    images_per_prompt: tuple[int, ...],
) -> Prepared:
    """Pads prompts to a batch and embeds them.

    Args:
        pruned: The prompts.
        features: The vision tokens that survive, as `Encoders.embed` takes them.
        manifest: The bundle's manifest.
        encoders: What runs the embedding.
        kept_indices: See `Prepared`.
        unpruned_tokens: See `Prepared`.
        images_per_prompt: See `Prepared`.
    """
    padded = pad_prompts(pruned, manifest.decoder.pad_token_id)
    return Prepared(
        input_ids=padded.input_ids,
        attention_mask=padded.attention_mask,
        position_ids=padded.position_ids,
        token_type_ids=(padded.input_ids == manifest.vision_tokens.image_token_id).astype(np.int64),
        next_positions=padded.next_positions,
        inputs_embeds=encoders.embed(padded.input_ids, features),
        kept_indices=kept_indices,
        unpruned_tokens=unpruned_tokens,
        images_per_prompt=images_per_prompt,
    )
