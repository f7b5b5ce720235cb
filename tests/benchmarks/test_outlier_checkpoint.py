"""The checkpoint with outliers is made of what it says, with a tiny language model in SmolLM2's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import outlier_checkpoint
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).resolve().parents[2] / "examples" / "shapes_vqa" / "model"
VOCAB = 300


class _Tokenizer:
    """Splits `digit` in two; every other word is one token."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        first = 100 + sum(map(ord, text)) % 100
        return type("Encoded", (), {"input_ids": [first, first + 1] if text == " digit" else [first]})


def test_tower_layers_and_words_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, num_hidden_layers=6, bos_token_id=7, eos_token_id=8, **sizes)
    )
    monkeypatch.setattr(outlier_checkpoint, "load_smollm2", lambda: (llama, _Tokenizer()))
    model = outlier_checkpoint.build()

    stored = load_file(DEMO / "model.safetensors")
    tower = {name: value for name, value in model.state_dict().items() if "vision_tower" in name}
    assert tower
    for name, value in tower.items():
        torch.testing.assert_close(value, stored[name.removeprefix("model.")].float(), rtol=0, atol=0)
    decoder = model.model.language_model
    assert len(decoder.layers) == 4
    for number, layer in enumerate(decoder.layers):
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(value, llama.model.layers[number].state_dict()[name], rtol=0, atol=0)
    torch.testing.assert_close(decoder.norm.weight, llama.model.norm.weight, rtol=0, atol=0)
    ids, table = outlier_checkpoint._TASK.vocabulary.ids, llama.model.embed_tokens.weight
    words = decoder.embed_tokens.weight
    assert words.shape == (64, 48)
    assert torch.equal(model.lm_head.weight, words)
    assert torch.equal(words[ids["<bos>"]], table[7])
    assert torch.equal(words[ids["red"]], table[_Tokenizer()(" red", add_special_tokens=False).input_ids[0]])
    pair = _Tokenizer()(" digit", add_special_tokens=False).input_ids
    torch.testing.assert_close(words[ids["digit"]], table[pair].mean(0))
