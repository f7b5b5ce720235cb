"""What qavp-inspect says of a selection: the numbers, against transformers and the NumPy reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from qavp_export.engines import EngineOptions
from qavp_export.inspect.look import Look, Question, look
from qavp_export.numerics.diverse import choose_diverse
from qavp_export.numerics.score import (
    hybrid_token_score,
    outlier_intensity,
    quantization_error,
    root_mean_square_normalize,
)
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import norm_relevance

OPTIONS = EngineOptions(threads=1)
KEPT, TOKENS = 7, 25


@pytest.fixture(scope="module")
def seen(best: Path, picture: Path) -> Look:
    return look(best, picture, Question(), OPTIONS)


def test_features_and_attention_are_those_of_transformers(seen: Look, tiny_llava: Path, picture: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32, attn_implementation="eager")
    pixels = AutoProcessor.from_pretrained(tiny_llava).image_processor(Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        tower = model.model.vision_tower(pixels["pixel_values"], output_attentions=True, output_hidden_states=True)
        features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])[0]
    (unit,) = seen.selections
    # Float32 sums in another order.
    np.testing.assert_allclose(unit.features, features.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(unit.semantic, tower.attentions[-2][0, :, 0, 1:].mean(0).numpy(), rtol=1e-4)


def test_scores_and_choice_are_the_references(seen: Look) -> None:
    (unit,) = seen.selections
    features, semantic, group = unit.features[None], unit.semantic[None], seen.manifest.recipe["group_size"]
    # The graph's arithmetic is the reference's, operator by operator: the same bits.
    np.testing.assert_array_equal(unit.error, quantization_error(features, group)[0])
    np.testing.assert_array_equal(unit.outlier, outlier_intensity(features)[0])
    np.testing.assert_array_equal(unit.score, hybrid_token_score(features, semantic, group_size=group)[0])
    np.testing.assert_array_equal(unit.kept, select_topk(unit.score[None], KEPT)[0])
    np.testing.assert_array_equal(unit.order, np.argsort(-unit.score, kind="stable")[:KEPT])


def test_settings_of_the_recipe_are_in_the_numbers(diverse: Path, picture: Path) -> None:
    (unit,) = look(diverse, picture, Question("what is it ?"), OPTIONS).selections
    features, relevance = unit.features[None], norm_relevance(unit.features[None])
    np.testing.assert_array_equal(unit.semantic, relevance[0])
    # E and R are of what the score is computed on.
    scored = root_mean_square_normalize(features)
    np.testing.assert_array_equal(unit.error, quantization_error(scored, 16)[0])
    np.testing.assert_array_equal(unit.outlier, outlier_intensity(scored)[0])
    score = hybrid_token_score(features, relevance, group_size=16, alpha=0.25, score_input="rms")
    np.testing.assert_array_equal(unit.score, score[0])
    order = choose_diverse("dpp", features, score, KEPT)[0]
    np.testing.assert_array_equal(unit.order, order)
    np.testing.assert_array_equal(unit.kept, np.sort(order))
    assert not np.array_equal(unit.order, unit.kept)


def test_the_bundle_is_left_as_it_is(best: Path, picture: Path) -> None:
    before = {path: path.read_bytes() for path in best.rglob("*") if path.is_file()}
    look(best, picture, Question(), OPTIONS)
    assert {path: path.read_bytes() for path in best.rglob("*") if path.is_file()} == before


def test_json_holds_the_numbers(seen: Look) -> None:
    facts = seen.to_dict()
    (unit,) = facts["units"]
    assert (unit["tokens"], unit["kept"], unit["grids"]) == (TOKENS, KEPT, [[5, 5]])
    assert unit["kept_indices"] == sorted(unit["order"])
    for name in ("semantic", "error", "outlier", "score"):
        np.testing.assert_array_equal(np.float32(unit[name]), getattr(seen.selections[0], name))
