"""The CLIP checkpoint that the scorer `text` takes its text tower and projections from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from qavp_export.checkpoint import Checkpoint, read_config
from qavp_export.errors import BundleError, CheckpointError, RecipeError
from qavp_export.manifest import Question
from qavp_export.runtime.processors import load_tokenizer
from qavp_export.tracing.naming import CLIP
from qavp_export.weights import CheckpointWeights

TOKENIZER_FOLDER = "clip"

_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "config.json")
# What gives the tower's weights their shapes and the tower its function.
_TOWER = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
)
# Of the vision tower: small, and unlike in any two towers that were not trained from one.
_COMPARED = "embeddings.position_embedding.weight"
_SAME_TOWER = 0.9
# What configurations say that were written before transformers knew better: the largest id ends a text.
_UNTOLD_EOS = 2


@dataclass(frozen=True)
class TextTower:
    """A CLIP checkpoint whose vision tower is that of the model.

    Attributes:
        name: The checkpoint as the user named it.
        checkpoint: The open checkpoint.
        config: Its `CLIPConfig`.
        eos_token_id: What the tokenizer ends a text with.
    """

    name: str
    checkpoint: Checkpoint
    config: Any
    eos_token_id: int

    def files(self) -> list[Path]:
        """Lists the files that a bundle copies: the tokenizer and what tells its class."""
        return [path for path in self.checkpoint.extra_files() if path.name.startswith(_TOKENIZER_FILES)]

    def describe(self) -> Question:
        """Returns what the manifest says."""
        context = int(self.config.text_config.max_position_embeddings)
        return Question(self.name, TOKENIZER_FOLDER, context, self.eos_token_id)

    def parameter_names(self, checkpoint_names: Iterable[str]) -> dict[str, str]:
        """Maps parameter names, as `trace_components` gives them, to the names of the checkpoint's tensors."""
        return {f"{CLIP}.{name}": name for name in checkpoint_names}


def open_text_tower(folder: Path, name: str, config: Any) -> TextTower:
    """Opens a CLIP checkpoint for a model; reads no weight.

    Args:
        folder: The CLIP checkpoint's folder.
        name: The checkpoint as the user named it.
        config: The model's Hugging Face configuration.

    Raises:
        RecipeError: The model's vision tower is not CLIP's, or another CLIP's.
        CheckpointError: The checkpoint is incomplete or corrupt, no CLIP, or its tokenizer does not end texts.
    """
    clip = read_clip(folder, name, config)
    return TextTower(name, Checkpoint.open(folder), clip, _end_of_text(folder, clip))


def read_clip(folder: Path, name: str, config: Any) -> Any:
    """Returns a checkpoint's `CLIPConfig`, from config.json alone; see `open_text_tower`."""
    tower = config.vision_config
    if tower.model_type != "clip_vision_model":
        raise RecipeError(
            f"semantic 'text' needs a CLIP vision tower, the model's is {tower.model_type}; use 'received' or 'norm'"
        )
    model_type = read_config(folder).get("model_type")
    if model_type != "clip":
        raise CheckpointError(
            f"{folder} holds no CLIP model: model_type is {model_type!r}; give the CLIP checkpoint that the vision "
            "tower comes from"
        )
    try:
        clip = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {' '.join(str(error).split())}") from error
    ours, theirs = ({key: getattr(part, key) for key in _TOWER} for part in (tower, clip.vision_config))
    differing = [f"{key} {theirs[key]}, not {ours[key]}" for key in _TOWER if theirs[key] != ours[key]]
    if differing:
        raise RecipeError(
            f"the vision tower of --clip {name} is not the model's: it has {'; '.join(differing)}; give the CLIP "
            "checkpoint that the model was trained with"
        )
    return clip


def check_tower(tower: TextTower, model: CheckpointWeights, clip: CheckpointWeights) -> None:
    """Checks that a model's vision tower has the weights of CLIP's, give or take a fine-tuning.

    Args:
        tower: The CLIP checkpoint.
        model: The model's weights.
        clip: CLIP's.

    Raises:
        RecipeError: It has others: the question would be compared with patches of another space.
        CheckpointError: One of the two lacks the tensor that is compared.
    """
    vision = tower.config.vision_config
    shape = ((vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size)
    ours = model.tensor(f"model.vision_tower.{_COMPARED}", shape).numpy().astype(np.float64)
    theirs = clip.tensor(f"{CLIP}.vision_model.{_COMPARED}", shape).numpy().astype(np.float64)
    cosine = float(np.sum(ours * theirs) / max(float(np.linalg.norm(ours) * np.linalg.norm(theirs)), 1e-30))
    if cosine < _SAME_TOWER:
        raise RecipeError(
            f"the vision tower of --clip {tower.name} has other weights than the model's (their position embeddings "
            f"have cosine {cosine:.2f}); give the CLIP checkpoint that the model was trained with"
        )


def _end_of_text(folder: Path, config: Any) -> int:
    """Returns the token that ends a text, whose state is the text's."""
    try:
        tokenizer = load_tokenizer(folder)
    except BundleError as error:
        raise CheckpointError(f"{error}; download the checkpoint again") from error
    ids = list(tokenizer("a")["input_ids"])
    eos, vocabulary = ids[-1] if ids else -1, int(config.text_config.vocab_size)
    pooled = int(config.text_config.eos_token_id)
    if eos != (max(tokenizer.get_vocab().values()) if pooled == _UNTOLD_EOS else pooled) or eos >= vocabulary:
        raise CheckpointError(
            f"the tokenizer in {folder} ends a text with token {eos}, and config.json reads token {pooled}; "
            "download the checkpoint again"
        )
    return int(eos)
