"""A tiny random CLIP whose vision tower is that of a tiny LLaVA: the real tokenizer class, one token a letter."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
)

from qavp_export.numerics.semantic import text_relevance
from tests.models.words import randomize

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 11
# Letters, letters that end a word, and two tokens more.
VOCAB = 2 * len(string.ascii_lowercase + "?") + 2


def make_clip(folder: Path, llava: Path, *, eos_token_id: int = VOCAB - 1, **changes: Any) -> Path:
    """Writes the checkpoint and returns its folder.

    Args:
        folder: Where to.
        llava: A checkpoint with a CLIP tower.
        eos_token_id: What config.json says of the token that ends a text; 2 in checkpoints that OpenAI published.
        changes: Settings of the vision tower that are to differ from LLaVA's, whose weights it then does not get.
    """
    torch.manual_seed(5)
    vision = AutoConfig.from_pretrained(llava).vision_config.to_dict() | changes
    text = CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=CONTEXT,
        bos_token_id=VOCAB - 2,
        eos_token_id=eos_token_id,
        pad_token_id=VOCAB - 1,
    )
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=20))
    randomize(clip, seed=5)
    tower = AutoModelForImageTextToText.from_pretrained(llava, dtype="auto").model.vision_tower
    if not changes:
        clip.vision_model.load_state_dict(tower.state_dict())
    clip.to(tower.dtype).save_pretrained(folder)
    letters = string.ascii_lowercase + "?"
    entries = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    CLIPTokenizer(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]).save_pretrained(folder)
    return folder


def clip_relevance(folder: Path, pixels: np.ndarray, questions: list[str]) -> np.ndarray:
    """Returns what transformers' CLIP and the reference say of the patches `[B,N]`; the tower is CLIP's own."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        questions, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    kind: Any = CLIPModel
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        text = model.get_text_features(**tokens).pooler_output
        states = model.vision_model(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        image = model.visual_projection(model.vision_model.post_layernorm(states[-2][:, 1:]))
    return text_relevance(image.numpy(), text.numpy())
