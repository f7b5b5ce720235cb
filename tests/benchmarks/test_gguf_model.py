"""The random GGUF model of the CPU latency benchmark."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_model import Llama, write_model
from transformers import LlamaConfig, LlamaForCausalLM

# Blocks of 256 in every row, and an odd number of words.
SIZES = Llama(hidden=256, intermediate=512, layers=2, heads=8, kv_heads=2, vocab=301, context=77)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, SIZES)
    return path


def test_the_gguf_is_a_llama(model_file: Path) -> None:
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=301,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    expected = {names.get_name(name, (".weight",)): tuple(value.shape) for name, value in model.named_parameters()}
    reader = gguf.GGUFReader(model_file)
    # GGUF lists the innermost axis first.
    assert {tensor.name: tuple(tensor.shape[::-1].tolist()) for tensor in reader.tensors} == expected
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            assert np.array_equal(values, np.ones_like(values)), tensor.name
        else:
            # 16,384 values and more, evenly spread: 3 % is many standard errors.
            assert values.std() == pytest.approx(0.02, rel=0.03), tensor.name
            assert len(np.unique(values)) == (64 if tensor.name == "output.weight" else 16), tensor.name


def test_the_gguf_says_what_llama_cpp_asks(model_file: Path) -> None:
    fields = gguf.GGUFReader(model_file).fields
    expected = {
        "general.architecture": "llama",
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.block_count": 2,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.context_length": 77,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 301,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {name: fields[name].contents() for name in expected} == expected


def test_the_gguf_has_the_types_of_a_q4_0_quantization(model_file: Path) -> None:
    reader = gguf.GGUFReader(model_file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds.pop("output.weight") == "Q6_K"
    assert {kinds.pop(name) for name in list(kinds) if name.endswith("norm.weight")} == {"F32"}
    assert set(kinds.values()) == {"Q4_0"}
    assert len(kinds) == 1 + 2 * 7
