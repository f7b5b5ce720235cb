"""Tiny random PaliGemma and PaliGemma 2: 49 tokens per image; the latter with capped logits and a sliding window."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.models.tiny import CHAT_TEMPLATE
from tests.models.words import BOS, EOS, PAD, randomize, word_tokenizer

# The processor adds 1,152 tokens for places and segments.
SIDE, PATCH, WORDS, VOCAB = 28, 4, 61, 1229


def make_paligemma(folder: Path) -> Path:
    """Writes a PaliGemma with one key/value head and returns its folder."""
    return _make(folder, GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=16))


def make_paligemma2(folder: Path) -> Path:
    """Writes a PaliGemma 2 and returns its folder."""
    caps = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0}
    return _make(
        folder,
        Gemma2Config(**_SIZES, **caps, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=11),
    )


_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def _make(folder: Path, text: GemmaConfig | Gemma2Config) -> Path:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<image>"], WORDS, {"image_token": "<image>"})
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=96,
        hidden_size=96,
        vocab_size=VOCAB,
    )
    model = PaliGemmaForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor.image_seq_length = (SIDE // PATCH) ** 2
    PaliGemmaProcessor(image_processor=processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(
        folder
    )
    return folder
