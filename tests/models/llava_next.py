"""Tiny random LLaVA-NeXT and LLaVA-OneVision: tiles of 5x5 patches in grids of up to 2x2 and 3x1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.models.tiny import CHAT_TEMPLATE
from tests.models.words import BOS, EOS, PAD, randomize, save_parts, word_tokenizer

SIDE, PATCH, VOCAB = 40, 8, 71
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE], [3 * SIDE, SIDE]]
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_IMAGES: dict[str, Any] = {
    "image_grid_pinpoints": PINPOINTS,
    "crop_size": {"height": SIDE, "width": SIDE},
}


def make_llava_next(folder: Path) -> Path:
    """Writes a LLaVA-NeXT with a CLIP tower and a Mistral decoder, and returns its folder."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<image>"], VOCAB, {"image_token": "<image>"})
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_TOWER),
        text_config=MistralConfig(**_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = LlavaNextForConditionalGeneration(config)
    randomize(model)
    model.to(torch.float16).save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, **_IMAGES),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_llava_onevision(folder: Path) -> Path:
    """Writes a LLaVA-OneVision with a SigLIP tower and a Qwen2 decoder, and returns its folder.

    Grids of more than two tiles are shrunk, so that a 2x2 grid is.
    """
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<image>", "<video>"], VOCAB, {"image_token": "<image>", "video_token": "<video>"})
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=Qwen2Config(**_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    randomize(model)
    model.to(torch.float16).save_pretrained(folder)
    images = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    settings = {
        "num_image_tokens": (SIDE // PATCH) ** 2,
        "vision_aspect_ratio": "anyres_max_2",
        "vision_feature_select_strategy": "full",
    }
    save_parts(folder, "LlavaOnevisionProcessor", images, tokenizer, CHAT_TEMPLATE, **settings)
    return folder
