"""What a sweep asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qavp_export.bench import sweep
from qavp_export.bench.sweep import export_sweep, parse_sweep, sweep_targets
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import InputError, RecipeError, UnavailableError


class Gpu:
    def __init__(self, *capability: int) -> None:
        self.capability = capability


def test_ratios_come_the_largest_first() -> None:
    assert parse_sweep("keep=0.05,1.0,0.125") == [1.0, 0.125, 0.05]


TEXTS = ("keep", "keep=", "alpha=0.5", "keep=a", "keep=0.5,", "keep=0", "keep=1.5", "keep=.5,0.5", "keep=nan")


@pytest.mark.parametrize("text", TEXTS)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--sweep"):
        parse_sweep(text)


def test_a_recipe_with_a_range_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "range.yaml"
    recipe.write_text("keep_range: [0.1, 0.5]\nkeep: 0.2\n")
    # The ratio of the sweep replaces what the recipe says of it.
    with pytest.raises(RecipeError, match="unknown recipe"):
        export_sweep(tiny_llava, "tiny", "no", [0.5], tmp_path, EngineTargets(), lambda *_: None)


def test_engines_are_built_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "available_engines", lambda: ["ort-cpu", "tensorrt", "tensorrt-rtx"])
    both = ["ort-cpu", "tensorrt", "tensorrt-rtx"]
    monkeypatch.setattr(sweep.Device, "open", lambda: Gpu(8, 9))
    assert sweep_targets(both) == EngineTargets(("tensorrt", "tensorrt-rtx"), (89,))
    assert sweep_targets(["ort-cpu"]) == EngineTargets()
    # TensorRT-RTX does not build for it.
    monkeypatch.setattr(sweep.Device, "open", lambda: Gpu(9, 0))
    assert sweep_targets(both) == EngineTargets(("tensorrt",))

    def none() -> Gpu:
        raise UnavailableError("no GPU")

    monkeypatch.setattr(sweep.Device, "open", none)
    assert sweep_targets(both) == EngineTargets()
