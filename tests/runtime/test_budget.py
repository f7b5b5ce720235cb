"""One bundle whose budget is chosen at run time, against bundles of fixed budgets, on a tiny random checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from qavp_export import EngineOptions, QavpModel, pipeline
from qavp_export.errors import InputError
from qavp_export.recipe import make_recipe

PROMPTS = ["<bos> <image> what is left of the circle ? answer", "<bos> what is <image> left of <image> ? answer"]


def export(checkpoint, target, **fields):
    fields |= {"positions": "original"}
    return pipeline.export(
        checkpoint, make_recipe("none", fields), target, name="tiny", force=False, progress=lambda *_: None
    )


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (41, 37, 3), dtype=np.uint8) for _ in range(3)]


@pytest.fixture(scope="module")
def ranged(tmp_path_factory, tiny_llava):
    folder = tmp_path_factory.mktemp("ranged") / "bundle"
    manifest = export(tiny_llava, folder, keep_range=(0.1, 0.9))
    assert manifest.vision_tokens.keep_range == [0.1, 0.9]
    assert (manifest.vision_tokens.before, manifest.vision_tokens.after, manifest.vision_tokens.keep) == (
        25,
        None,
        0.125,
    )
    assert [spec.name for spec in manifest.components["vision_encoder"].inputs] == ["pixel_values", "keep_tokens"]
    return QavpModel.from_bundle(folder, "ort-reference", EngineOptions(threads=1))


@pytest.mark.parametrize(("keep", "kept"), [(0.125, 3), (0.62, 16)])
def test_a_chosen_budget_answers_as_a_fixed_one(tmp_path, tiny_llava, ranged, images, keep, kept):
    manifest = export(tiny_llava, tmp_path / "bundle", keep=keep)
    assert (manifest.vision_tokens.after, manifest.vision_tokens.keep_range) == (kept, None)
    fixed = QavpModel.from_bundle(tmp_path / "bundle", "ort-reference", EngineOptions(threads=1))
    given = ([images[0], images[1:]], PROMPTS)
    expected = fixed.prepare(*given, chat_template=False)
    got = ranged.prepare(*given, chat_template=False, keep=keep)
    assert [indices.tolist() for indices in got.kept_indices] == [indices.tolist() for indices in expected.kept_indices]
    for name in ("input_ids", "attention_mask", "position_ids", "next_positions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    answers = ranged.generate_ids(*given, chat_template=False, keep=keep, max_new_tokens=8)
    assert answers == fixed.generate_ids(*given, chat_template=False, max_new_tokens=8)
    # float32 sums that may run in another order; logits are of magnitude 10
    np.testing.assert_allclose(
        ranged.logits(*given, chat_template=False, keep=keep), fixed.logits(*given, chat_template=False), atol=1e-4
    )
    with pytest.raises(InputError, match=f"keeps {keep} of the vision tokens and no other share"):
        fixed.generate(images[0], PROMPTS[0], chat_template=False, keep=keep)


def test_budgets_change_from_call_to_call(ranged, images):
    lengths = [
        [len(indices) for indices in ranged.prepare(images[0], PROMPTS[0], chat_template=False, keep=keep).kept_indices]
        for keep in (0.9, 0.1, None)
    ]
    # floor(22.5 + 0.5), floor(2.5 + 0.5), and the default of 0.125
    assert lengths == [[23], [3], [3]]
    with pytest.raises(InputError, match=r"keep is 0.05; the bundle serves 0.1 to 0.9"):
        ranged.generate(images[0], PROMPTS[0], chat_template=False, keep=0.05)
