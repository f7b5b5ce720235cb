"""One request, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qavp_export.bench.clock import DECODE, EMBEDDING, PREFILL, VISION, TimedEngine
from qavp_export.runtime import QavpModel


@dataclass(frozen=True)
class Request:
    """What every contestant is asked.

    Attributes:
        images: Image files, as text: a request travels as JSON.
        prompt: The question, without a chat template.
        tokens: Tokens of the answer; its end does not end it earlier, so that all do the same work.
        keep: Share of vision tokens that survives; None: the bundle's default.
    """

    images: tuple[str, ...]
    prompt: str
    tokens: int
    keep: float | None = None


@dataclass(frozen=True)
class Sample:
    """What one request took, in seconds.

    Attributes:
        preprocess: Reading and processing the images, tokenizing, putting the prompt together.
        vision_encoder: Vision tower, projector, scoring and gather.
        embedding: Embedding the prompt.
        prefill: The decoder over the prompt.
        decode: The decoder over each later token.
        ttft: From the request to the first token.
        tpot: Time per token after the first, sampling and text included; None for an answer of one token.
        end_to_end: From the request to the end of the answer.
        prompt_tokens: Tokens that the decoder's prompt has.
        vision_tokens: Those of the images that survive.
        vision_tokens_before: Those of the images before pruning.
        answer_tokens: Tokens of the answer.
        answer: Its text.
    """

    preprocess: float
    vision_encoder: float
    embedding: float
    prefill: float
    decode: list[float]
    ttft: float
    tpot: float | None
    end_to_end: float
    prompt_tokens: int
    vision_tokens: int
    vision_tokens_before: int
    answer_tokens: int
    answer: str

    @property
    def other(self) -> float:
        """What is in none of the stages: choosing tokens, text, Python."""
        stages = self.preprocess + self.vision_encoder + self.embedding + self.prefill + sum(self.decode)
        return max(self.end_to_end - stages, 0.0)


def answer(model: QavpModel, engine: TimedEngine, request: Request) -> Sample:
    """Answers a request with a model that runs on a timed engine.

    Raises:
        QavpError: As `QavpModel.generate`.
    """
    templated = model.preparer.has_chat_template
    prompt = request.prompt if templated else f"{model.preparer.image_token}\n" * len(request.images) + request.prompt
    calls = engine.begin()
    started = time.perf_counter()
    prepared = model.prepare(list(request.images), prompt, chat_template=templated, keep=request.keep)
    ready = time.perf_counter()
    stream = model.text_stream()
    pieces: list[str] = []
    times: list[float] = []
    for (token,) in model.generate_steps(prepared, None, request.tokens):
        if token is not None:
            pieces.append(stream.push(token))
            times.append(time.perf_counter())
    pieces.append(stream.finish())
    ended = time.perf_counter()
    vision, embedding = sum(calls[VISION]), sum(calls[EMBEDDING])
    return Sample(
        preprocess=ready - started - vision - embedding,
        vision_encoder=vision,
        embedding=embedding,
        prefill=sum(calls[PREFILL]),
        decode=calls[DECODE],
        ttft=times[0] - started,
        tpot=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        end_to_end=ended - started,
        prompt_tokens=int(prepared.attention_mask.sum()),
        vision_tokens=sum(len(indices) for indices in prepared.kept_indices),
        vision_tokens_before=sum(prepared.unpruned_tokens),
        answer_tokens=len(times),
        answer="".join(pieces),
    )
