"""Opens a checkpoint and understands what it is; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import BundleError, CheckpointError
from qavp_export.families import Family, Plan, family_of
from qavp_export.runtime.processors import load_processor
from qavp_export.text_tower import TextTower


@dataclass(frozen=True)
class Source:
    """A checkpoint that was opened and understood; no weight has been read.

    Attributes:
        name: The model as the user named it.
        checkpoint: The open checkpoint.
        config: The Hugging Face configuration.
        family: The model's family.
        plan: The model's sizes.
        tokenizer: The checkpoint's tokenizer.
        text_tower: The CLIP checkpoint that the scorer `text` reads the question with; None for other scorers.
    """

    name: str
    checkpoint: Checkpoint
    config: Any
    family: Family
    plan: Plan
    tokenizer: Any
    text_tower: TextTower | None = None


def open_source(folder: Path, name: str) -> Source:
    """Opens a checkpoint and finds its family; reads no weight.

    Raises:
        CheckpointError: The checkpoint is incomplete, corrupt or not supported.
    """
    checkpoint = Checkpoint.open(folder)
    config, family, plan = read_plan(folder, checkpoint.config)
    try:
        tokenizer = load_processor(folder).tokenizer
    except BundleError as error:
        raise CheckpointError(f"{error}; download the checkpoint again") from error
    if tokenizer.convert_ids_to_tokens(plan.image_token_id) is None:
        raise CheckpointError(
            f"{folder / 'config.json'} names image token {plan.image_token_id}, which the tokenizer does not have; "
            "download the checkpoint again"
        )
    return Source(name, checkpoint, config, family, plan, tokenizer)


def read_plan(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Family, Plan]:
    """Returns the Hugging Face configuration, the family and the sizes from config.json alone.

    Raises:
        CheckpointError: The model type is not supported, or the configuration is not valid.
    """
    family = family_of(config)
    try:
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return parsed, family, family.plan(parsed)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
