"""A tiny random VipLLaVA: four layers of a CLIP tower, read at three of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from tests.models.tiny import CHAT_TEMPLATE
from tests.models.words import randomize, tiny_text, word_tokenizer

SIDE, PATCH, VOCAB = 40, 8, 67


def make_vipllava(folder: Path) -> Path:
    """Writes the checkpoint and returns its folder: 25 tokens per image."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<image>"], VOCAB, {"image_token": "<image>"})
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=tiny_text(LlamaConfig, VOCAB, 128),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, -4, 2],
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = VipLlavaForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
