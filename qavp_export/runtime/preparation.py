"""From prompts and images to what the decoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qavp_export.engines import Encoders
from qavp_export.errors import BundleError
from qavp_export.manifest import Manifest
from qavp_export.runtime.batching import Prepared, check_context, pad_prompts
from qavp_export.runtime.images import ImagePreprocessor, ImageSource
from qavp_export.runtime.processors import load_processors
from qavp_export.runtime.prompts import PromptEncoder, read_chat_template


class Preparer:
    """Everything that comes before the decoder.

    Args:
        bundle: Folder with tokenizer and processor files.
        manifest: The bundle's manifest; of the decoder only its sizes are read.
        encoders: What runs the vision encoder and the embedding.

    Attributes:
        tokenizer: The transformers tokenizer.
        has_chat_template: Whether the checkpoint brings a chat template.
    """

    def __init__(self, bundle: Path, manifest: Manifest, encoders: Encoders) -> None:
        self._manifest = manifest
        self._encoders = encoders
        self.tokenizer, image_processor = load_processors(bundle)
        template = read_chat_template(bundle, self.tokenizer)
        self.has_chat_template = template is not None
        self._encoder = PromptEncoder(self.tokenizer, template, manifest.vision_tokens)
        self._preprocessor = ImagePreprocessor(image_processor, *_image_size(manifest))

    def prepare(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageSource]],
        *,
        chat_template: bool,
        answers: Sequence[str] | None = None,
    ) -> Prepared:
        """Encodes a batch; see `Prepared` for what it yields.

        Args:
            prompts: The prompts.
            images: The images of each prompt.
            chat_template: Whether to wrap the text in the checkpoint's chat template, images first. Without it a prompt
                is used as it is and holds the image token once where each image goes.
            answers: What follows each prompt; None for nothing.

        Raises:
            PromptError: A prompt does not match its images or does not fit the context.
            ImageError: An image cannot be read.
        """
        tokens, decoder = self._manifest.vision_tokens, self._manifest.decoder
        counts = tuple(len(group) for group in images)
        ids = [
            self._encoder.encode(prompt, count, chat_template, answer)
            for prompt, count, answer in zip(prompts, counts, answers or [""] * len(prompts), strict=True)
        ]
        check_context(ids, tokens, decoder)
        pixels = self._preprocessor([image for group in images for image in group])
        if len(pixels):
            features, kept = self._encoders.encode_images(pixels)
        else:
            features = np.zeros((0, tokens.after, decoder.hidden_size), np.float32)
            kept = np.zeros((0, tokens.after), np.int64)
        padded = pad_prompts(ids, kept, counts, tokens, decoder)
        return Prepared(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            position_ids=padded.position_ids,
            next_positions=padded.next_positions,
            inputs_embeds=self._encoders.embed(padded.input_ids, features),
            kept_indices=kept,
            images_per_prompt=counts,
        )


def _image_size(manifest: Manifest) -> tuple[int, int]:
    """Height and width of the vision encoder's static grid."""
    component = manifest.components.get("vision_encoder")
    shapes = [spec.shape for spec in component.inputs if spec.name == "pixel_values"] if component else []
    if len(shapes) == 1 and len(shapes[0]) == 4:
        height, width = shapes[0][2:]
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    raise BundleError(
        "the manifest gives no fixed image size (vision_encoder, pixel_values [B,3,H,W]); export the bundle again"
    )
