"""Tiny random Idefics3 and SmolVLM2: tiles of 9x9 patches, merged to 9 tokens, and a Llama decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.models.tiny import CHAT_TEMPLATE
from tests.models.words import randomize, save_parts, tiny_text, word_tokenizer

SIDE, PATCH, VOCAB = 36, 4, 73
_ROWS = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
_SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_ROWS]
_IMAGES: dict[str, Any] = {
    "size": {"longest_edge": 2 * SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "do_image_splitting": True,
}


def make_idefics3(folder: Path) -> Path:
    """Writes an Idefics3, tied, and returns its folder: 9 tokens per tile, at most 2x2 tiles and the whole."""
    tokenizer = _make(folder, Idefics3Config, Idefics3VisionConfig, Idefics3ForConditionalGeneration)
    images = Idefics3ImageProcessorPil(**_IMAGES)
    Idefics3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=9, chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder


def make_smolvlm(folder: Path) -> Path:
    """Writes a SmolVLM2 and returns its folder; as `make_idefics3`."""
    tokenizer = _make(folder, SmolVLMConfig, SmolVLMVisionConfig, SmolVLMForConditionalGeneration)
    images = SmolVLMImageProcessorPil(**_IMAGES)
    save_parts(folder, "SmolVLMProcessor", images, tokenizer, CHAT_TEMPLATE, image_seq_len=9)
    return folder


def _make(folder: Path, config_type: type, vision_type: type, model_type: type) -> PreTrainedTokenizerFast:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(_SPECIAL, VOCAB)
    config = config_type(
        vision_config=vision_type(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=tiny_text(LlamaConfig, VOCAB, 256),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=3,
        tie_word_embeddings=True,
    )
    model = model_type(config)
    randomize(model)
    model.save_pretrained(folder)
    return tokenizer
