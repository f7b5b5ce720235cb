"""A tiny random Gemma3: 9x9 patches pooled to 9 tokens, and a window shorter than an image."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.models.tiny import CHAT_TEMPLATE
from tests.models.words import BOS, EOS, PAD, randomize, word_tokenizer

SIDE, PATCH, VOCAB = 36, 4, 69
_NAMED = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


def make_gemma3(folder: Path) -> Path:
    """Writes the checkpoint and returns its folder: 9 tokens per image, heads wider than the stream."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(list(_NAMED.values()), VOCAB, _NAMED)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _NAMED.items()}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=Gemma3TextConfig(
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            vocab_size=VOCAB,
            max_position_embeddings=128,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        mm_tokens_per_image=9,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )
    model = Gemma3ForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(folder)
    Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_pan_and_scan=False),
        tokenizer=tokenizer,
        image_seq_length=9,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<start_of_image>"),
    ).save_pretrained(folder)
    return folder
