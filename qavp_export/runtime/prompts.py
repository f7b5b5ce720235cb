"""Prompts in: text and images become token ids and pixel values, by the checkpoint's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qavp_export.engines import IntArray
from qavp_export.errors import BundleError, ImageError, PromptError, UnavailableError
from qavp_export.manifest import VisionTokens
from qavp_export.runtime.images import ImageSource, describe_source, load_image, one_line
from qavp_export.runtime.question import QuestionEncoder


@dataclass(frozen=True)
class EncodedPrompt:
    """What the processor makes of one prompt.

    Attributes:
        input_ids: Token ids `[S]` of the unpruned prompt: as many placeholders as its images have tokens.
        images: What the processor says of the images, among it `pixel_values`; empty without images.
        labels: What error messages call each image.
        question: The prompt's text in CLIP's tokens `[L]`, where the vision encoder reads it; None elsewhere.
    """

    input_ids: IntArray
    images: Mapping[str, Any]
    labels: tuple[str, ...]
    question: IntArray | None = None


class PromptEncoder:
    """Encodes one prompt with its images as the checkpoint's processor does.

    Args:
        processor: A transformers processor.
        tokens: The manifest's vision tokens.
        image_options: What the image processor is told beyond its settings.
        question: What tokenizes the question for the vision encoder; None where that reads none.

    Attributes:
        chat_template: The checkpoint's chat template, None if it has none.
        image_token: What stands for one image in a prompt; where processors write other tokens around an image, it is
            not the placeholder that the embedding replaces.
    """

    def __init__(
        self,
        processor: Any,
        tokens: VisionTokens,
        image_options: Mapping[str, Any],
        question: QuestionEncoder | None = None,
    ) -> None:
        self._question = question
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._image_options = dict(image_options)
        self.chat_template = _find_template(processor)
        self.image_token: str = processor.image_token
        self._reserved = {self.image_token, tokens.image_token}

    def encode(
        self, prompt: str, sources: Sequence[ImageSource], chat_template: bool, answer: str = ""
    ) -> EncodedPrompt:
        """Encodes one prompt.

        Args:
            prompt: What the user says; without the chat template, the whole prompt with one image token where
                each image goes.
            sources: Images of this prompt. The chat template puts them before the text.
            chat_template: Whether to wrap the text in the checkpoint's chat template.
            answer: Text that follows the prompt.

        Raises:
            PromptError: The prompt has no text, or its placeholders do not match its images.
            ImageError: An image cannot be read or processed.
            BundleError: The checkpoint's chat template fails.
            UnavailableError: jinja2, which renders chat templates, is not installed.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt is a string, not {type(prompt).__name__}")
        text = self._render(prompt, len(sources)) if chat_template else prompt
        text += answer
        found = text.count(self.image_token)
        if found != len(sources):
            raise PromptError(
                f"the prompt has {found} image placeholders and {len(sources)} image(s); write one {self.image_token} "
                "for each image"
            )
        images = [load_image(source) for source in sources]
        labels = tuple(
            f"{describe_source(source)} ({image.width}x{image.height})"
            for source, image in zip(sources, images, strict=True)
        )
        outputs = self._process(text, images, labels)
        (ids,) = outputs.pop("input_ids")
        if not ids:
            raise PromptError("the prompt is empty; write a question")
        question = None if self._question is None else self._question.encode(self._plain(prompt))
        return EncodedPrompt(np.array(ids, dtype=np.int64), outputs, labels, question)

    def _plain(self, prompt: str) -> str:
        """Returns the words of a prompt, which without the chat template may hold image tokens."""
        for token in self._reserved:
            prompt = prompt.replace(token, " ")
        return " ".join(prompt.split())

    def _process(self, text: str, images: list[Image.Image], labels: Sequence[str]) -> dict[str, Any]:
        # As transformers' processors do: a template that already starts with the BOS text gets no second one.
        bos = self._tokenizer.bos_token
        try:
            return dict(
                self._processor(
                    text=[text],
                    # Nested: these images share one prompt, which matters to LLaVA-OneVision.
                    images=[images] if images else None,
                    add_special_tokens=bos is None or not text.startswith(bos),
                    verbose=False,
                    images_kwargs=self._image_options,
                )
            )
        except (ValueError, TypeError) as error:
            self._blame(images, labels)
            raise PromptError(f"the checkpoint's processor refuses the prompt ({one_line(error)})") from error

    def _blame(self, images: list[Image.Image], labels: Sequence[str]) -> None:
        """Raises for the first image that the image processor refuses by itself."""
        for image, label in zip(images, labels, strict=True):
            try:
                self._processor.image_processor([[image]], **self._image_options)
            except (ValueError, TypeError) as error:
                raise ImageError(f"image {label} cannot be processed ({one_line(error)})") from error

    def _render(self, prompt: str, num_images: int) -> str:
        if self.chat_template is None:
            raise PromptError(
                "the bundle has no chat template; turn it off (chat_template=False, --raw) and write the "
                f"whole prompt, with one {self.image_token} for each image"
            )
        for token in self._reserved:
            if token in prompt:
                raise PromptError(
                    f"the prompt's text contains {token!r}, which stands for an image; remove it, or turn the chat "
                    "template off (chat_template=False, --raw) to place images yourself"
                )
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except ImportError as error:
            # transformers renders templates with jinja2 but does not require it; torch usually brings it in.
            raise UnavailableError("chat templates need jinja2, which is not installed: pip install jinja2") from error
        except Exception as error:  # a template is a program from the checkpoint: it may raise anything
            raise BundleError(f"the bundle's chat template fails ({one_line(error)})") from error
        return text


def _find_template(processor: Any) -> str | None:
    """Returns the processor's chat template, else the tokenizer's, which often is the text model's alone."""
    for owner in (processor, processor.tokenizer):
        template = owner.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is not None:
            return str(template)
    return None
