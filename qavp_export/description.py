"""What the manifest says before anything has been written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from qavp_export.errors import CheckpointError
from qavp_export.families import Layout
from qavp_export.manifest import DecoderSpec, Manifest, VisionTokens
from qavp_export.settings import Settings
from qavp_export.source import Source

# What the keep ratio applies to. Where images are not cut up, their only tile is the image.
_UNITS: Mapping[Layout, str] = MappingProxyType({"grid": "tile", "tiles": "tile-set", "native": "image"})
_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def describe(source: Source, settings: Settings) -> Manifest:
    """Returns what the manifest says before anything has been written."""
    plan, tokenizer = source.plan, source.tokenizer
    eos = _token_ids(source, "eos_token_id", tokenizer.eos_token_id)
    pad = _token_ids(source, "pad_token_id", tokenizer.pad_token_id)
    return Manifest(
        source=source.name,
        family=source.family.model_type,
        recipe=settings.resolved(),
        vision_tokens=_vision_tokens(source, settings),
        decoder=DecoderSpec(
            num_layers=plan.num_layers,
            num_key_value_heads=plan.num_key_value_heads,
            head_dim=plan.head_dim,
            hidden_size=plan.hidden_size,
            vocab_size=plan.vocab_size,
            context_length=plan.context_length,
            eos_token_ids=eos,
            pad_token_id=(pad or eos or [0])[0],
        ),
        components={},
        precision={},
        weight_error={},
        notes=[],
        calibration=None,
        checkpoint_bytes=source.checkpoint.total_bytes,
        checkpoint_quantization=None,
        parity={},
        versions=versions(),
    )


def _vision_tokens(source: Source, settings: Settings) -> VisionTokens:
    recipe, layout = settings.recipe, source.family.layout
    newlines = "dropped" if settings.pruned else "kept"
    return VisionTokens(
        before=source.plan.vision_tokens,
        after=settings.tokens_kept,
        image_token=str(source.tokenizer.convert_ids_to_tokens(source.plan.image_token_id)),
        image_token_id=source.plan.image_token_id,
        positions=recipe.positions,
        keep=recipe.keep,
        keep_range=None if recipe.keep_range is None else list(recipe.keep_range),
        layout=layout,
        layout_settings=_layout_settings(source),
        unit=_UNITS[layout],
        newlines=newlines if layout == "tiles" else None,
        question=None if source.text_tower is None else source.text_tower.describe(),
    )


def _layout_settings(source: Source) -> dict[str, Any]:
    settings, row_break = source.family.layout_settings(source.config), source.family.row_break_token
    if row_break is None:
        return settings
    token = source.tokenizer.convert_tokens_to_ids(row_break)
    # For what it does not have, a tokenizer gives the id of unknown words.
    known = token is not None and source.tokenizer.convert_ids_to_tokens(token) == row_break
    return settings | {"row_break_token_id": token} if known else settings


def _token_ids(source: Source, key: str, fallback: int | None) -> list[int]:
    """Returns token ids from generation_config.json, else the text configuration, else the tokenizer."""
    path = source.checkpoint.folder / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    value = generation.get(key) if isinstance(generation, dict) else None
    if value is None:
        value = getattr(source.config.text_config, key, None)
    if value is None:
        value = fallback
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list) else [int(value)]


def versions() -> dict[str, str]:
    """Returns the versions of qavp-export and of the libraries that write graphs."""
    found = {}
    for library in ("qavp-export", *_LIBRARIES):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
