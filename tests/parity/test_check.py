"""The check at the end of an export: right ones pass; those that went wrong are found, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qavp_export import pipeline
from qavp_export.calibration import gptq as gptq_calibration
from qavp_export.errors import ParityError
from qavp_export.manifest import Manifest
from qavp_export.numerics.clip import quantize_two_level_clipped
from qavp_export.numerics.gptq import gptq_two_level
from qavp_export.numerics.two_level import TwoLevel
from qavp_export.passes import quantizer, two_level_scale
from qavp_export.recipe import make_recipe
from tests.models.tiny import TinySpec, make_llava


def _export(model: Path, target: Path, recipe: str = "rtn", **fields: Any) -> Manifest:
    made = make_recipe(recipe, fields)
    return pipeline.export(model, made, target, name=model.name, force=False, progress=lambda *_: None)


@pytest.mark.parametrize("semantic", ["received", "norm", "random"])
def test_other_scorers_and_settings_pass_parity(tmp_path: Path, tiny_llava: Path, semantic: str) -> None:
    manifest = _export(
        tiny_llava, tmp_path / "bundle", "none", keep=0.2, semantic=semantic, alpha=0.8, score_input="rms", seed=3
    )
    assert manifest.parity["verdict"] == "PASS"
    assert manifest.recipe["semantic"] == semantic


@pytest.mark.parametrize("layers", [(-2, -3), (-3, -1)])
def test_several_feature_layers_are_scored_by_the_latest(tmp_path: Path, layers: tuple[int, ...]) -> None:
    checkpoint = make_llava(tmp_path / "model", TinySpec(feature_layers=layers))
    # Parity compares the kept tokens with transformers' own attentions.
    assert _export(checkpoint, tmp_path / "bundle", "none", keep=0.3).parity["verdict"] == "PASS"


def test_parity_catches_weights_on_another_grid(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one_group(values: np.ndarray, group_size: int) -> TwoLevel:
        right = quantize_two_level_clipped(values, group_size)
        return replace(right, multipliers=np.roll(right.multipliers, 1, axis=-1))

    # The graph's weights get the multipliers of the neighbouring group; the reference does not.
    monkeypatch.setattr(quantizer, "quantize_two_level_clipped", off_by_one_group)
    with pytest.raises(ParityError, match="of the quantized weights differ"):
        _export(tiny_llava, tmp_path / "bundle", keep=0.3)
    assert list(tmp_path.iterdir()) == []


def test_parity_catches_weights_that_calibration_ruined(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffled(*args: Any, **options: Any) -> TwoLevel:
        right = gptq_two_level(*args, **options)
        return replace(right, codes=np.roll(right.codes, 1, axis=-1))

    # Every code one channel further: GPTQ's codes need not be the nearest, but this is another weight.
    monkeypatch.setattr(gptq_calibration, "gptq_two_level", shuffled)
    with pytest.raises(ParityError, match=r"the weight of \S+ has cosine -?0\.\d\d with the checkpoint's"):
        _export(tiny_llava, tmp_path / "bundle", "gptq", keep=0.3, calibration_samples=1)
    assert list(tmp_path.iterdir()) == []


def test_parity_catches_activations_on_another_grid(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Amplitudes divided by 8 rather than 7: values clip, most codes change.
    monkeypatch.setattr(two_level_scale, "_BODY", two_level_scale._BODY.replace("float = 7.0", "float = 8.0"))
    with pytest.raises(ParityError, match="of the quantized activations differ"):
        _export(tiny_llava, tmp_path / "bundle", keep=0.3)
