"""A bundle as a model of lmms-eval (EvolvingLMMs-Lab, 0.7): `--model qavp --model_args pretrained=BUNDLE`.

Only lmms-eval imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from PIL import Image

from qavp_export.engines import EngineOptions
from qavp_export.errors import InputError, UnavailableError
from qavp_export.evaluate.teacher_forcing import forced_logits
from qavp_export.numerics.divergence import log_probabilities
from qavp_export.runtime import ImageSource, QavpModel
from qavp_export.runtime.processors import load_processor

Message = Mapping[str, Any]
"""A turn: `role`, and `content` as a list of `{"type": "text", "text"}` and `{"type": "image", "url"}`."""

# What lmms-eval's own models take where a task does not say.
_MAX_NEW_TOKENS = 1024

# Tasks written for LLaVA put this into their text; the chat template has its own.
_TASKS_IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class _Prompt:
    """A conversation as the model reads it, one image token for each picture."""

    text: str
    images: list[ImageSource]


class QavpSimple(lmms):  # type: ignore[misc]  # the package brings no types
    """A bundle behind the interface that takes a context and pictures.

    Args:
        pretrained: Folder that qavp-export wrote.
        engine: What runs it.
        keep: Share of vision tokens that survives, within the bundle's range.
        batch_size: Requests at once.
        threads: Threads of the engine.
        device: Not read: the engine's name says where it runs.
        max_batch_size: Not read.

    Raises:
        BundleError: The folder is not a whole bundle.
        UnavailableError: The engine is not available here.
    """

    is_simple: ClassVar[bool] = True

    def __init__(
        self,
        pretrained: str,
        engine: str = "ort-cpu",
        keep: float | None = None,
        batch_size: int | str = 1,
        threads: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del device, max_batch_size  # lmms-eval gives these to every model
        self._model = QavpModel.from_bundle(pretrained, engine, EngineOptions(threads=threads))
        self._keep = keep
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size is {batch_size!r}; give 1 or more")
        self._batch_size = int(batch_size)
        processor = load_processor(Path(pretrained))
        self._renderer = next((one for one in (processor, processor.tokenizer) if one.chat_template), None)

    @property
    def batch_size(self) -> int:
        """Requests at once."""
        return self._batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers requests of `(context, generation_kwargs, doc_to_visual, doc_id, task, split)`, in their order."""
        asked = []
        for request in requests:
            context, settings, doc_to_visual, doc_id, task, split = request.args
            pictures = doc_to_visual(self.task_dict[task][split][doc_id])
            asked.append((self._render(_one_turn(context, pictures)), settings))
        return self._answer([request.args[0] for request in requests], asked)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Judges given answers: requests of `(context, doc_to_target, doc_to_visual, doc_id, task, split)`.

        Returns:
            For each the mean negative log-likelihood of the answer's tokens, and whether they are the most likely ones.
            The loss, against the interface's description, because lmms-eval takes the choice of the least value.
        """
        read = [self._continuation(request.args) for request in requests]
        results: list[tuple[float, bool]] = []
        for start in range(0, len(read), self._batch_size):
            part = read[start : start + self._batch_size]
            prepared = self._model.prepare(
                [prompt.images for prompt, _ in part],
                [prompt.text for prompt, _ in part],
                chat_template=False,
                keep=self._keep,
            )
            answers = [self._answer_ids(prompt.text, answer) for prompt, answer in part]
            for ids, logits in zip(answers, forced_logits(self._model, prepared, answers), strict=True):
                expected = log_probabilities(logits, self._model.manifest.vision_tokens.image_token_id)
                loss = -float(expected[np.arange(len(ids)), ids].mean())
                results.append((loss, bool((expected.argmax(axis=-1) == ids).all())))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses: tasks of several rounds are not served.

        Raises:
            UnavailableError: Always.
        """
        raise UnavailableError(
            f"the model qavp serves no tasks of several rounds ({len(requests)} requests); leave them out"
        )

    def _answer(self, contexts: Sequence[Any], asked: Sequence[tuple[_Prompt, Mapping[str, Any]]]) -> list[str]:
        answers = [""] * len(asked)
        for rows in _batches([settings for _, settings in asked], self._batch_size):
            settings = dict(asked[rows[0]][1] or {})
            texts = self._model.generate(
                [asked[row][0].images for row in rows],
                [asked[row][0].text for row in rows],
                chat_template=False,
                keep=self._keep,
                **_sampling(settings),
            )
            for row, text in zip(rows, texts, strict=True):
                answers[row] = _until(text, settings.get("until"))
                self.cache_hook.add_partial("generate_until", (contexts[row], settings), answers[row])
        return answers

    def _continuation(self, args: tuple[Any, ...]) -> tuple[_Prompt, str]:
        context, target, *rest = args
        document, pictures = None, []
        if rest:  # what a choice is worth without its question comes with no document
            doc_to_visual, doc_id, task, split = rest
            document = self.task_dict[task][split][doc_id]
            pictures = doc_to_visual(document)
        answer = target if isinstance(target, str) else target(document)
        if not answer.strip():
            raise InputError("lmms-eval asks for the likelihood of an empty answer; check the task's choices")
        return self._render(_one_turn(context, pictures)), answer

    def _answer_ids(self, prompt: str, answer: str) -> list[int]:
        """Tokens that the answer adds to the prompt; tokenized together, as a word's first piece depends on both."""
        encode: Callable[..., list[int]] = self._model.preparer.tokenizer.encode
        return encode(prompt + answer, add_special_tokens=False)[len(encode(prompt, add_special_tokens=False)) :]

    def _render(self, messages: Sequence[Message]) -> _Prompt:
        """Renders a conversation by the checkpoint's chat template; without one, its texts line by line."""
        images: list[ImageSource] = []
        turns = []
        for message in messages:
            content: list[dict[str, str]] = []
            for part in _parts(message["content"]):
                if part["type"] == "image":
                    images.append(_picture(part["url"]))
                    content.append({"type": "image"})
                elif part["type"] == "text":
                    content.append({"type": "text", "text": str(part["text"])})
                else:
                    raise InputError(f"the model qavp reads images and text, not {part['type']!r}; leave the task out")
            turns.append({"role": message["role"], "content": content})
        if self._renderer is None:
            marks = {"image": self._model.preparer.image_token}
            lines = [part.get("text", marks.get(part["type"], "")) for turn in turns for part in turn["content"]]
            return _Prompt("\n".join(lines), images)
        text: str = self._renderer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return _Prompt(text, images)


class QavpChat(QavpSimple):
    """A bundle behind the interface that takes messages."""

    is_simple: ClassVar[bool] = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers requests of `(context, doc_to_messages, generation_kwargs, doc_id, task, split)`, in their order."""
        asked = []
        for request in requests:
            _, doc_to_messages, settings, doc_id, task, split = request.args
            asked.append((self._render(doc_to_messages(self.task_dict[task][split][doc_id])), settings))
        return self._answer([prompt.text for prompt, _ in asked], asked)


def _one_turn(context: str, pictures: Sequence[Any] | None) -> list[Message]:
    text = context.replace(_TASKS_IMAGE_TOKEN, "").strip()
    content = [{"type": "image", "url": picture} for picture in pictures or ()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _parts(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _picture(value: object) -> ImageSource:
    if isinstance(value, Image.Image | str | Path):
        return value
    raise InputError(f"the model qavp reads images, not {type(value).__name__}; leave the task out")


def _batches(settings: Sequence[Mapping[str, Any]], size: int) -> Iterator[list[int]]:
    """Yields rows whose settings are the same, some at a time."""
    groups: dict[str, list[int]] = {}
    for row, one in enumerate(settings):
        groups.setdefault(json.dumps(one or {}, sort_keys=True, default=str), []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translates generation settings of transformers, as tasks have them.

    Raises:
        InputError: Beams are asked for.
    """
    if int(settings.get("num_beams") or 1) > 1:
        raise InputError(f"num_beams is {settings['num_beams']}; the model qavp serves 1: --gen_kwargs num_beams=1")
    greedy = settings.get("do_sample") is False
    return {
        "max_new_tokens": int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
        "temperature": 0.0 if greedy else float(settings.get("temperature") or 0.0),
        "top_p": float(settings.get("top_p") or 1.0),
        "top_k": int(settings.get("top_k") or 0),
    }


def _until(answer: str, stops: str | Sequence[str] | None) -> str:
    """Returns what comes before the first of the texts that end an answer."""
    ends = [stops] if isinstance(stops, str) else list(stops or ())
    cuts = [answer.find(end) for end in ends if end and end in answer]
    return answer[: min(cuts)] if cuts else answer
