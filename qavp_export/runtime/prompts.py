"""Prompts in: chat template, image placeholders, token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qavp_export.engines import IntArray
from qavp_export.errors import BundleError, PromptError, UnavailableError
from qavp_export.manifest import VisionTokens


class PromptEncoder:
    """Turns one prompt into token ids with k placeholders for each of its images."""

    def __init__(self, tokenizer: Any, chat_template: str | None, tokens: VisionTokens) -> None:
        """Wraps a transformers tokenizer; `chat_template` is None if the checkpoint has none."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._tokens = tokens

    def encode(self, prompt: str, num_images: int, chat_template: bool, answer: str = "") -> IntArray:
        """Encodes one prompt.

        Args:
            prompt: What the user says; without the chat template, the whole prompt with one image token where
                each image goes (it is widened to the k placeholders here, as a transformers processor does).
            num_images: Images of this prompt. The chat template puts them before the text.
            chat_template: Whether to wrap the text in the checkpoint's chat template.
            answer: Text that follows the prompt.

        Returns:
            Token ids `[S]`.

        Raises:
            PromptError: The prompt has no text, or its placeholders do not match its images.
            BundleError: The checkpoint's chat template fails.
            UnavailableError: jinja2, which renders chat templates, is not installed.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt is a string, not {type(prompt).__name__}")
        text = self._render(prompt, num_images) if chat_template else prompt
        text += answer
        token, per_image = self._tokens.image_token, self._tokens.after
        self._check(text.count(token) * per_image, num_images)
        # As transformers' processors do: a template that already starts with the BOS text gets no second one.
        bos = self._tokenizer.bos_token
        ids = self._tokenizer(
            text.replace(token, token * per_image),
            add_special_tokens=bos is None or not text.startswith(bos),
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        # Counted again on the ids: text between placeholders may merge with them in an odd tokenizer.
        self._check(ids.count(self._tokens.image_token_id), num_images)
        if not ids:
            raise PromptError("the prompt is empty; write a question")
        return np.array(ids, dtype=np.int64)

    def _render(self, prompt: str, num_images: int) -> str:
        if self._chat_template is None:
            raise PromptError(
                "the bundle has no chat template; turn it off (chat_template=False, --raw) and write the "
                f"whole prompt, with one {self._tokens.image_token} for each image"
            )
        if self._tokens.image_token in prompt:
            raise PromptError(
                f"the prompt's text contains {self._tokens.image_token!r}, which stands for an image; remove "
                "it, or turn the chat template off (chat_template=False, --raw) to place images yourself"
            )
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except ImportError as error:
            # transformers renders templates with jinja2 but does not require it; torch usually brings it in.
            raise UnavailableError("chat templates need jinja2, which is not installed: pip install jinja2") from error
        except Exception as error:  # a template is a program from the checkpoint: it may raise anything
            reason = " ".join(str(error).split())
            raise BundleError(f"the bundle's chat template fails ({reason})") from error
        return text

    def _check(self, found: int, num_images: int) -> None:
        per_image = self._tokens.after
        if found != num_images * per_image:
            raise PromptError(
                f"the prompt has {found} image placeholders and its {num_images} image(s) need "
                f"{num_images * per_image} ({per_image} each); write one {self._tokens.image_token} "
                "for each image"
            )


def read_chat_template(bundle: Path, tokenizer: Any) -> str | None:
    """Finds the chat template: the tokenizer's, or the processor's in the files that older checkpoints use.

    Raises:
        BundleError: A processor file is not JSON.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        return str(template)
    for name in ("chat_template.json", "processor_config.json"):
        path = bundle / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError) as error:
            raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
        if found is not None:
            return str(found)
    return None
