"""Processor files of every family, as checkpoints have them, and encoders that only record what they are given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    PixtralImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from qavp_export.manifest import Component, DecoderSpec, Manifest, TensorSpec, VisionTokens
from tests.models.words import save_parts, word_tokenizer

SIDE, PATCH, VOCAB, HIDDEN, CONTEXT = 28, 7, 100, 3, 400
FRAME = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
CELLS = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
GEMMA = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "video_token": "<video>",
}
TEMPLATE = (
    "<bos> {% for part in messages[0].content %}{{ 'IMAGE ' if part.type == 'image' else part.text }}{% endfor %} w59"
)
EDGE = {"shortest_edge": SIDE}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
LLAVA = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
TILE_SETTINGS = {"grid_pinpoints": PINPOINTS, "tile_size": SIDE, "tile_patches": 4, "max_tiles": None}

# Family: model_type, processor, image processor, settings, special tokens, special tokens by name.
FAMILIES = {
    "llava": ("llava", "LlavaProcessor", CLIPImageProcessorPil(size=EDGE, crop_size=SQUARE), LLAVA, [], {}),
    "vipllava": ("vipllava", None, CLIPImageProcessorPil(size=EDGE, crop_size=SQUARE), LLAVA, [], {}),
    "llava_next": (
        "llava_next",
        "LlavaNextProcessor",
        LlavaNextImageProcessorPil(size=EDGE, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS),
        LLAVA,
        [],
        {},
    ),
    "llava_onevision": (
        "llava_onevision",
        "LlavaOnevisionProcessor",
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        ["<video>"],
        {},
    ),
    "idefics3": (
        "idefics3",
        "Idefics3Processor",
        Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": SIDE}),
        {"image_seq_len": 4},
        [*FRAME, *CELLS],
        {},
    ),
    "smolvlm": (
        "smolvlm",
        "SmolVLMProcessor",
        SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": SIDE}),
        {"image_seq_len": 4},
        [*FRAME, *CELLS],
        {},
    ),
    "internvl": (
        "internvl",
        "InternVLProcessor",
        GotOcr2ImageProcessorPil(size=SQUARE, max_patches=4),
        {"image_seq_length": 4},
        [],
        INTERNVL,
    ),
    "gemma3": ("gemma3", "Gemma3Processor", Gemma3ImageProcessorPil(size=SQUARE), {"image_seq_length": 4}, [], GEMMA),
    "paligemma": (
        "paligemma",
        "PaliGemmaProcessor",
        SiglipImageProcessorPil(size=SQUARE, image_seq_length=16),
        {},
        [],
        {},
    ),
    "pixtral": (
        "llava",
        "PixtralProcessor",
        PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": PATCH, "width": PATCH}),
        {"patch_size": PATCH, "spatial_merge_size": 1},
        ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        {},
    ),
    "mistral3": (
        "mistral3",
        None,
        PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": PATCH, "width": PATCH}),
        {"patch_size": PATCH, "spatial_merge_size": 2},
        ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        {},
    ),
}
# What stands for an image in a prompt where it is not <image>.
IMAGE_TEXT = {"gemma3": "<boi>", "pixtral": "[IMG]", "mistral3": "[IMG]"}


def image_text(family: str) -> str:
    return IMAGE_TEXT.get(family, "<image>")


def write_processor(folder: Path, family: str) -> Path:
    """Writes tokenizer, processor and model type."""
    model_type, kind, image_processor, settings, special, named = FAMILIES[family]
    folder.mkdir()
    ours = ["<image>", *special] if image_text(family) == "<image>" and not named else special
    tokenizer = word_tokenizer(ours, VOCAB, named)
    save_parts(folder, kind, image_processor, tokenizer, TEMPLATE.replace("IMAGE", image_text(family)), **settings)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_manifest(tokens: VisionTokens, *inputs: str) -> Manifest:
    """A manifest whose vision encoder takes pixels, and besides what is named."""
    shapes = {
        "grid": ["batch", 3, SIDE, SIDE],
        "tiles": ["tiles", 3, SIDE, SIDE],
        "native": [1, 3, "height", "width"],
    }
    specs = [TensorSpec("pixel_values", "FLOAT", shapes[tokens.layout])]
    specs += [TensorSpec(name, "INT64", ["tokens"]) for name in inputs]
    return Manifest(
        source="fake",
        family="fake",
        recipe={},
        vision_tokens=tokens,
        decoder=DecoderSpec(1, 1, HIDDEN, HIDDEN, VOCAB, CONTEXT, [2], 0),
        components={"vision_encoder": Component("vision_encoder/model.onnx", specs, [])},
        precision={},
        weight_error={},
        notes=[],
        calibration=None,
        checkpoint_bytes=0,
        checkpoint_quantization=None,
        parity={},
        versions={},
    )


class RecordingEncoders:
    """Stands for the graphs: keeps the tokens that it is told to, and marks each with its unit and its place.

    The feature of token `t` of unit `u`, units counted over all calls from 1, is `[u, t, 0]`.
    """

    def __init__(self, image_token_id: int, kept: list[list[int]]) -> None:
        self.calls: list[dict] = []
        self._image_token_id = image_token_id
        self._kept = kept
        self._done = 0

    def encode_images(self, inputs):
        self.calls.append(dict(inputs))
        # Of a call with several units each has its own row of pixels; packed tiles and native images come alone.
        units = 1 if "token_indices" in inputs else len(inputs["pixel_values"])
        kept = np.array(self._kept[self._done : self._done + units], np.int64)
        if "keep_tokens" in inputs:
            assert inputs["keep_tokens"].tolist() == [kept.shape[1]]
        number = np.arange(self._done + 1, self._done + 1 + units)[:, None]
        self._done += units
        features = np.stack([np.broadcast_to(number, kept.shape), kept, np.zeros_like(kept)], axis=-1)
        return features.astype(np.float32), kept

    def embed(self, input_ids, image_features):
        embeds = np.full((*input_ids.shape, HIDDEN), -1, np.float32)
        embeds[input_ids == self._image_token_id] = image_features.reshape(-1, HIDDEN)
        return embeds
