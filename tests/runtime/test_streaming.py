"""Streamed pieces concatenate to what the tokenizer decodes at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qavp_export.runtime.streaming import TextStream

EOS = 256


def byte_level():
    """One token for each byte, as GPT-2's alphabet writes them: every other character takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


PIECES = ["\u2581the", "\u2581a", "\u2581", "cat", "s", ",", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "\u2581\u2581"]


def llama_like():
    """Words that carry their leading space, and bytes; the decoder strips the first space of the text."""
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(PIECES)}, "s"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


BYTES, LLAMA = byte_level(), llama_like()


def stream(tokenizer, tokens):
    stream = TextStream(tokenizer, [tokenizer.eos_token_id])
    return [*(stream.push(token) for token in tokens), stream.finish()]


# Written out, the end-of-sequence token is read as that token, which is not text.
@given(st.text(max_size=30).filter(lambda text: "<eos>" not in text))
def test_any_text_through_bytes(text):
    tokens = BYTES(text)["input_ids"]
    assert "".join(stream(BYTES, tokens)) == text


def test_a_character_comes_out_once_it_is_complete():
    tokens = BYTES("a\N{EURO SIGN}\N{GRINNING FACE}b")["input_ids"]
    expected = ["a", "", "", "\N{EURO SIGN}", "", "", "", "\N{GRINNING FACE}", "b", ""]
    assert stream(BYTES, tokens) == expected


def test_an_answer_that_ends_within_a_character():
    tokens = BYTES("ok \N{EURO SIGN}")["input_ids"][:-1]
    assert "".join(stream(BYTES, tokens)) == BYTES.decode(tokens) == "ok \N{REPLACEMENT CHARACTER}"


# Bytes only as whole characters: of an invalid run the decoder replaces even the bytes that were fine before.
UNITS = [[0], [1], [2], [3], [4], [5], [6], [7, 8, 9], [10]]


@given(st.lists(st.sampled_from(UNITS), max_size=20))
def test_any_tokens_of_a_sentencepiece_vocabulary(units):
    tokens = [token for unit in units for token in unit]
    assert "".join(stream(LLAMA, tokens)) == LLAMA.decode(tokens)


def test_space_after_a_newline_survives():
    tokens = [PIECES.index(piece) for piece in ("\u2581the", "<0x0A>", "\u2581cat"[:1], "cat", "\u2581a")]
    assert LLAMA.decode(tokens) == "the\n cat a"
    assert stream(LLAMA, tokens) == ["the", "\n", " ", "cat", " a", ""]


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA])
def test_eos_adds_nothing(tokenizer):
    assert stream(tokenizer, [tokenizer.eos_token_id]) == ["", ""]
    assert stream(tokenizer, []) == [""]
