"""A tiny random InternVL: tiles of 8x8 patches, merged to 16 tokens, and a tied Qwen2 decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from tests.models.tiny import CHAT_TEMPLATE
from tests.models.words import randomize, save_parts, tiny_text, word_tokenizer

SIDE, PATCH, VOCAB = 32, 4, 71
_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def make_internvl(folder: Path) -> Path:
    """Writes the checkpoint and returns its folder: 16 tokens per tile."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(list(_NAMED.values()), VOCAB, _NAMED)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            attention_bias=True,
            image_size=[SIDE, SIDE],
            patch_size=[PATCH, PATCH],
        ),
        text_config=tiny_text(Qwen2Config, VOCAB, 256, tie_word_embeddings=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    model = InternVLForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(folder)
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    template = CHAT_TEMPLATE.replace("<image>", "<IMG_CONTEXT>")
    save_parts(folder, "InternVLProcessor", images, tokenizer, template, image_seq_length=16)
    return folder
