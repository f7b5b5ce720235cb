"""The question by which the vision encoder scores tokens, as CLIP's tokenizer writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qavp_export.engines import IntArray
from qavp_export.manifest import Manifest, Question
from qavp_export.runtime.processors import load_tokenizer

TEXT_INPUT_IDS = "text_input_ids"


class QuestionEncoder:
    """Tokenizes questions.

    Args:
        bundle: The bundle's folder.
        question: What the manifest says of questions.
    """

    def __init__(self, bundle: Path, question: Question) -> None:
        self._tokenizer = load_tokenizer(bundle / question.tokenizer)
        self._context_length = question.context_length

    def encode(self, text: str) -> IntArray:
        """Returns token ids `[L]`, the token that ends the text included; a text beyond the context is cut."""
        ids = self._tokenizer(text, truncation=True, max_length=self._context_length)["input_ids"]
        return np.array(ids, dtype=np.int64)


def load_question_encoder(bundle: Path, manifest: Manifest) -> QuestionEncoder | None:
    """Returns what tokenizes questions; None for a bundle whose vision encoder reads none.

    Raises:
        BundleError: The tokenizer's files are missing or corrupt.
    """
    question = manifest.vision_tokens.question
    return None if question is None else QuestionEncoder(bundle, question)


def pad_questions(questions: Sequence[IntArray], eos_token_id: int) -> IntArray:
    """Pads questions on the right to the longest `[B,L]`, with the token that ends them: CLIP reads the first."""
    padded = np.full((len(questions), max(map(len, questions))), eos_token_id, dtype=np.int64)
    for row, question in enumerate(questions):
        padded[row, : len(question)] = question
    return padded
