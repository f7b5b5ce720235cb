"""Tiny random Pixtral and Mistral 3: images of any size in patches of 4 pixels, and heads wider than the stream.

Pixtral has a Mistral decoder, Mistral 3 that of Ministral 3, whose queries grow with their position.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

from tests.models.tiny import CHAT_TEMPLATE
from tests.models.words import BOS, EOS, PAD, randomize, save_parts, word_tokenizer

PATCH, MERGE, VOCAB = 4, 2, 71
_SPECIAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
)


def make_pixtral(folder: Path) -> Path:
    """Writes a Pixtral and returns its folder: a token for each patch."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(_SPECIAL, VOCAB)
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_seq_length": 1}
    model = LlavaForConditionalGeneration(LlavaConfig(**_parts(tokenizer), **settings))
    return _save(folder, model, tokenizer, merge=1)


def make_mistral3(folder: Path) -> Path:
    """Writes a Mistral 3 and returns its folder: a token for each square of 2x2 patches."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(_SPECIAL, VOCAB)
    # Queries are scaled from position 32 on, which prompts with all image tokens reach.
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1}
    text = Ministral3Config(**_TEXT, rope_parameters={"rope_theta": 10000.0, **rope})
    parts = _parts(tokenizer) | {"text_config": text}
    config = Mistral3Config(**parts, spatial_merge_size=MERGE, tie_word_embeddings=False)
    return _save(folder, Mistral3ForConditionalGeneration(config), tokenizer, merge=MERGE)


def _parts(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vision_config": PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=PATCH,
        ),
        "text_config": MistralConfig(**_TEXT, sliding_window=None),
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
    }


def _save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, merge: int) -> Path:
    randomize(model)
    model.to(torch.float16).save_pretrained(folder)
    images = PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": PATCH, "width": PATCH})
    template = CHAT_TEMPLATE.replace("<image>", "[IMG]")
    save_parts(folder, "PixtralProcessor", images, tokenizer, template, patch_size=PATCH, spatial_merge_size=merge)
    return folder
