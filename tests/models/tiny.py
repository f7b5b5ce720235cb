"""Tiny random LLaVA checkpoints, built in code, in the layout that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer{% endif %}"
)
WORDS = ("what", "is", "the", "color", "of", "a", "circle", "left", "right", "answer", "?")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")


@dataclass(frozen=True)
class TinySpec:
    """Sizes of a tiny LLaVA; odd on purpose."""

    decoder: str = "llama"
    vision: str = "clip"
    hidden: int = 96
    intermediate: int = 160
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    vocab: int = 67
    tied: bool = False
    vision_hidden: int = 32
    vision_layers: int = 3
    image_size: int = 40
    patch_size: int = 8
    feature_layers: tuple[int, ...] = (-2,)
    dtype: torch.dtype = torch.float16
    context: int = 128
    max_shard_size: str = "50GB"
    seed: int = 0


def make_llava(folder: Path, spec: TinySpec | None = None) -> Path:
    """Writes a random checkpoint with tokenizer, processor and chat template, and returns its folder."""
    spec = spec or TinySpec()
    torch.manual_seed(spec.seed)
    model = LlavaForConditionalGeneration(_config(spec))
    with torch.no_grad():
        for parameter in model.parameters():
            # The default 0.02 leaves logits so flat that greedy decoding turns on rounding.
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.05))
    model.to(spec.dtype).save_pretrained(folder, max_shard_size=spec.max_shard_size)
    _processor(spec).save_pretrained(folder)
    return folder


def _config(spec: TinySpec) -> LlavaConfig:
    tower = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[spec.vision]
    vision = tower(
        hidden_size=spec.vision_hidden,
        intermediate_size=2 * spec.vision_hidden,
        num_hidden_layers=spec.vision_layers,
        num_attention_heads=2,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
    )
    # SigLIP has no [CLS] to drop, and published checkpoints take its last layer.
    siglip = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    layers = spec.feature_layers[0] if len(spec.feature_layers) == 1 else list(spec.feature_layers)
    return LlavaConfig(
        **(siglip if spec.vision == "siglip" else {"vision_feature_layer": layers}),
        vision_config=vision,
        text_config=_text_config(spec),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(spec.image_size // spec.patch_size) ** 2,
        tie_word_embeddings=spec.tied,
    )


def _text_config(spec: TinySpec) -> PreTrainedConfig:
    kind = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[spec.decoder]
    return kind(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        vocab_size=spec.vocab,
        max_position_embeddings=spec.context,
        tie_word_embeddings=spec.tied,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=SPECIAL.index("<eos>"),
    )


def _processor(spec: TinySpec) -> LlavaProcessor:
    words = [*SPECIAL, *WORDS]
    words += [f"w{number}" for number in range(len(words), spec.vocab)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    size = {"height": spec.image_size, "width": spec.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=fast,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="full" if spec.vision == "siglip" else "default",
        num_additional_image_tokens=0 if spec.vision == "siglip" else 1,
        chat_template=CHAT_TEMPLATE,
    )
