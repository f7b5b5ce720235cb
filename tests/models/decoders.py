"""Tiny LLaVA with decoders of every kind: windows, biases, capped logits, scaled rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from tests.models.tiny import TinySpec, _config, _processor
from tests.models.words import BOS, EOS, PAD, randomize

_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 67,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
)
_TYPES: Mapping[str, type[PreTrainedConfig]] = MappingProxyType(
    {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}
)


def _rope(kind: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **fields}}


# Kind of decoder, and what differs from `_SIZES`. Windows and original lengths are shorter than a prompt.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "mistral, window of 5": ("mistral", {"sliding_window": 5}),
        "qwen2, biases, window of 6 in the second layer": (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        ),
        "llama, biases, tied, MQA": (
            "llama",
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
        ),
        "llama, MHA, heads wider than the stream": ("llama", {"num_key_value_heads": 6, "head_dim": 32}),
        "gemma2, capped logits, window of 7": (
            "gemma2",
            {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7, "attn_logit_softcapping": 1.0},
        ),
        "linear RoPE": ("llama", {"max_position_embeddings": 32, **_rope("linear")}),
        "dynamic RoPE": ("llama", {"max_position_embeddings": 32, **_rope("dynamic")}),
        "yarn RoPE": ("qwen2", _rope("yarn", original_max_position_embeddings=32)),
        "llama3 RoPE": (
            "llama",
            _rope("llama3", original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
    }
)


def variant_config(name: str) -> LlavaConfig:
    """Returns the configuration of a variant: 25 vision tokens."""
    kind, fields = VARIANTS[name]
    config = _config(TinySpec())
    config.text_config = _TYPES[kind](**{**_SIZES, **fields})
    config.tie_word_embeddings = bool(config.text_config.tie_word_embeddings)
    return config


def random_variant(name: str) -> LlavaForConditionalGeneration:
    """Returns a random model of a variant."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(variant_config(name))
    randomize(model)
    return model.eval()


def make_variant(folder: Path, name: str) -> Path:
    """Writes a variant's checkpoint and returns its folder."""
    random_variant(name).save_pretrained(folder)
    _processor(TinySpec()).save_pretrained(folder)
    return folder
