"""Fixtures: bundles of the tiny LLaVA, loaded, their processor, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from qavp_export import EngineOptions, QavpForImageTextToText, pipeline
from qavp_export.recipe import make_recipe


def export(checkpoint: Path, target: Path, recipe: str, overrides: dict[str, Any]) -> Path:
    pipeline.export(
        checkpoint,
        make_recipe(recipe, overrides),
        target,
        name="tiny-llava",
        force=False,
        progress=lambda *_: None,
    )
    return target


@pytest.fixture(scope="session")
def float_bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tokens, no quantization: the Hugging Face model itself."""
    return export(tiny_llava, tmp_path_factory.mktemp("huggingface") / "float", "none", {"keep": 1.0})


@pytest.fixture(scope="session")
def pruned_bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 of 25 tokens at their original positions, or as many as the caller chooses; W4A4."""
    overrides = {"keep": 0.4, "keep_range": (0.2, 0.8), "positions": "original"}
    return export(tiny_llava, tmp_path_factory.mktemp("huggingface") / "pruned", "rtn", overrides)


@pytest.fixture(scope="session")
def float_model(float_bundle: Path) -> QavpForImageTextToText:
    return QavpForImageTextToText.from_pretrained(float_bundle, options=EngineOptions(threads=1))


@pytest.fixture(scope="session")
def pruned_model(pruned_bundle: Path) -> QavpForImageTextToText:
    return QavpForImageTextToText.from_pretrained(pruned_bundle, options=EngineOptions(threads=1))


@pytest.fixture(scope="session")
def torch_model(tiny_llava: Path) -> LlavaForConditionalGeneration:
    """The checkpoint in transformers, in float32 as the graphs are."""
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def processor(pruned_bundle: Path) -> Any:
    return AutoProcessor.from_pretrained(pruned_bundle)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)) for _ in range(4)]
