"""QavpModel: a bundle, loaded and ready to answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast, overload

from qavp_export.engines import Engine, EngineOptions, FloatArray, load_engine
from qavp_export.errors import InputError, PromptError
from qavp_export.manifest import Manifest
from qavp_export.runtime.batching import Prepared
from qavp_export.runtime.generation import generate_tokens
from qavp_export.runtime.images import ImageSource
from qavp_export.runtime.preparation import Preparer
from qavp_export.runtime.sampling import Sampling
from qavp_export.runtime.streaming import TextStream

ImagesOfPrompt = ImageSource | Sequence[ImageSource] | None
"""What one prompt shows: one image, several, or none."""

Images = ImageSource | Sequence[ImagesOfPrompt] | None
"""The images of one prompt, or for a batch a list with one entry for each prompt."""

Prompts = list[str] | tuple[str, ...]
"""A batch of prompts."""


class QavpModel:
    """A bundle that answers questions about images. One instance serves several threads.

    Every method takes `images` and `prompts` in one of two forms: one prompt with its image, list of images
    or None; or a list of prompts with None or a list that holds one such entry for each prompt.

    Example:
        >>> model = QavpModel.from_bundle("bundle")
        >>> model.generate("photo.jpg", "What is in the picture?")
        >>> for piece in model.generate("photo.jpg", "What is in the picture?", stream=True):
        ...     print(piece, end="", flush=True)

    Attributes:
        manifest: The bundle's manifest.
        engine: What runs the graphs.
        preparer: Everything that comes before the decoder.
    """

    def __init__(self, bundle: Path, manifest: Manifest, engine: Engine) -> None:
        """Loads the tokenizer and the image processor of an opened bundle; use `from_bundle`."""
        self.manifest = manifest
        self.engine = engine
        self.preparer = Preparer(bundle, manifest, engine)
        self._tokenizer = self.preparer.tokenizer

    @classmethod
    def from_bundle(
        cls,
        bundle: str | os.PathLike[str],
        engine: str = "ort-cpu",
        options: EngineOptions | None = None,
    ) -> QavpModel:
        """Loads a bundle.

        Args:
            bundle: Folder that qavp-export wrote.
            engine: What runs it; `qavp_export.engines.available_engines()` lists the names.
            options: How it runs: threads, precision of the vision tower, memory; None: the engine's defaults.

        Raises:
            BundleError: The folder is not a whole bundle.
            UnavailableError: The engine is not available here.
            InputError: An option is out of range.
        """
        folder = Path(bundle)
        manifest = Manifest.read(folder)
        return cls(folder, manifest, load_engine(engine, folder, manifest, options or EngineOptions()))

    def prepare(
        self, images: Images, prompts: str | Prompts, *, chat_template: bool = True, keep: float | None = None
    ) -> Prepared:
        """Does everything that comes before the decoder: see `Prepared` for what it yields.

        Args:
            images: See the class.
            prompts: See the class.
            chat_template: Whether to wrap the text in the checkpoint's chat template, images first. Without
                it a prompt is used as it is and holds the image token once where each image goes.
            keep: The share of vision tokens that survives, within what the bundle serves (the manifest's
                `vision_tokens.keep_range`); None for its default.

        Raises:
            PromptError: A prompt does not match its images or does not fit the context.
            ImageError: An image cannot be read.
            InputError: The bundle does not serve `keep`.
        """
        texts, images_of = _pair(images, prompts)
        return self.preparer.prepare(texts, images_of, chat_template=chat_template, keep=keep)

    def logits(
        self, images: Images, prompts: str | Prompts, *, chat_template: bool = True, keep: float | None = None
    ) -> FloatArray:
        """Runs the prompts only; the arguments are those of `prepare`.

        Returns:
            Logits of every position, padding included `[B, S, V]`.

        Raises:
            PromptError: As `prepare`.
            ImageError: As `prepare`.
            InputError: As `prepare`.
        """
        prepared = self.prepare(images, prompts, chat_template=chat_template, keep=keep)
        return self.engine.start().prefill(
            prepared.inputs_embeds, prepared.attention_mask, prepared.position_ids, prepared.token_type_ids
        )

    def generate_steps(
        self, prepared: Prepared, sampling: Sampling | None = None, max_new_tokens: int = 256
    ) -> Iterator[list[int | None]]:
        """Generates from a prepared batch, one step at a time: what `generate` is made of.

        Args:
            prepared: What `prepare` yielded.
            sampling: How tokens are chosen; None: greedy.
            max_new_tokens: Most tokens of each answer.

        Returns:
            An iterator; each step is one token per prompt, None for an answer that has ended. The token that
            ends an answer is included.

        Raises:
            InputError: `max_new_tokens` is less than 1.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        return generate_tokens(self.engine, self.manifest, prepared, sampling or Sampling(), max_new_tokens)

    def generate_ids(
        self,
        images: Images,
        prompts: str | Prompts,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        chat_template: bool = True,
        keep: float | None = None,
    ) -> list[list[int]]:
        """Generates token ids; the arguments are those of `generate`.

        Returns:
            The new tokens of each prompt (a list of one for one prompt), without padding and with the token
            that ended the answer, if one did.

        Raises:
            InputError: As `generate`.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        prepared = self.prepare(images, prompts, chat_template=chat_template, keep=keep)
        steps = self.generate_steps(prepared, sampling, max_new_tokens)
        return _collect(steps, len(prepared.images_per_prompt))

    @overload
    def generate(
        self,
        images: Images,
        prompts: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        seed: int | None = ...,
        stream: Literal[False] = ...,
        chat_template: bool = ...,
        keep: float | None = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        images: Images,
        prompts: Prompts,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        seed: int | None = ...,
        stream: Literal[False] = ...,
        chat_template: bool = ...,
        keep: float | None = ...,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        images: Images,
        prompts: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        seed: int | None = ...,
        stream: Literal[True],
        chat_template: bool = ...,
        keep: float | None = ...,
    ) -> Iterator[str]: ...

    def generate(
        self,
        images: Images,
        prompts: str | Prompts,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stream: bool = False,
        chat_template: bool = True,
        keep: float | None = None,
    ) -> str | list[str] | Iterator[str]:
        """Answers prompts about images.

        Args:
            images: See the class.
            prompts: See the class.
            max_new_tokens: Most tokens of each answer; the context may end it earlier.
            temperature: 0 takes the most likely token each time; more is more random.
            top_p: Samples from the most likely tokens that together reach this probability.
            top_k: Samples from the k most likely tokens; 0: from all.
            seed: Makes sampling repeatable.
            stream: Whether to yield the answer piece by piece; one prompt only.
            chat_template: See `prepare`.
            keep: See `prepare`.

        Returns:
            The answer; a list of answers for a list of prompts; an iterator over pieces of text if streamed.

        Raises:
            PromptError: A prompt does not match its images or does not fit the context.
            ImageError: An image cannot be read.
            InputError: Another argument is out of range.
        """
        if stream and not isinstance(prompts, str):
            raise InputError("stream=True takes one prompt as a string; for a batch leave stream out")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        prepared = self.prepare(images, prompts, chat_template=chat_template, keep=keep)
        steps = self.generate_steps(prepared, sampling, max_new_tokens)
        if stream:
            return self._stream(steps)
        answers = _collect(steps, len(prepared.images_per_prompt))
        texts = [self._decode(answer) for answer in answers]
        return texts[0] if isinstance(prompts, str) else texts

    def text_stream(self) -> TextStream:
        """Returns what turns the ids of one answer into text, token by token."""
        return TextStream(self._tokenizer, self.manifest.decoder.eos_token_ids)

    def _stream(self, steps: Iterator[list[int | None]]) -> Iterator[str]:
        stream = self.text_stream()
        for step in steps:
            piece = "".join(stream.push(token) for token in step if token is not None)
            if piece:
                yield piece
        if rest := stream.finish():
            yield rest

    def _decode(self, answer: list[int]) -> str:
        if answer and answer[-1] in self.manifest.decoder.eos_token_ids:
            answer = answer[:-1]
        text: str = self._tokenizer.decode(answer, skip_special_tokens=True)
        return text


def _collect(steps: Iterator[list[int | None]], rows: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def _pair(images: Images, prompts: str | Prompts) -> tuple[list[str], list[list[ImageSource]]]:
    """Brings both forms of the arguments to a list of prompts and a list of images for each."""
    if isinstance(prompts, str):
        return [prompts], [_as_list(cast(ImagesOfPrompt, images))]
    if not isinstance(prompts, (list, tuple)):
        raise PromptError(f"prompts is a string or a list of strings, not {type(prompts).__name__}")
    if not prompts:
        raise PromptError("the list of prompts is empty; give at least one prompt")
    if images is None:
        return list(prompts), [[] for _ in prompts]
    if not isinstance(images, (list, tuple)) or len(images) != len(prompts):
        given = f"{len(images)} entries" if isinstance(images, (list, tuple)) else "one image"
        raise PromptError(
            f"{len(prompts)} prompts come with {given} of images; give a list with one entry for each "
            "prompt: an image, a list of images, or None"
        )
    return list(prompts), [_as_list(group) for group in images]


def _as_list(images: ImagesOfPrompt) -> list[ImageSource]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    return [cast(ImageSource, images)]
