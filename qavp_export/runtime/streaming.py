"""Text out: token by token, without broken characters or lost spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns the ids of one answer into pieces of text whose concatenation is the decoded answer.

    Each piece is what a new token adds to the decoding of a short window of tokens before it. A character
    that needs several tokens is held back until it is complete (bytes that never become valid text may decode
    differently). transformers' `TextStreamer` is not used: it
    starts afresh after every newline, where a SentencePiece decoder then drops the next line's leading space.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        """Starts an empty answer; tokens of `eos_token_ids` add no text."""
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._window: list[int] = []
        self._settled = 0  # tokens of the window that are already out

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes; often empty."""
        if token in self._eos:
            return ""
        self._window.append(token)
        before = self._decode(self._window[: self._settled])
        text = self._decode(self._window)
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return text[len(before) :]

    def finish(self) -> str:
        """Returns what was held back: an answer may end within a character."""
        before = self._decode(self._window[: self._settled])
        text = self._decode(self._window)
        self._window = []
        self._settled = 0
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
