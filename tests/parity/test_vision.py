"""The reference of the vision encoder, against the attentions that transformers returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from qavp_export.errors import ParityError
from qavp_export.families import family_for
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_tokens, select_topk
from qavp_export.parity.vision import Selection, VisionReference
from qavp_export.recipe import make_recipe
from qavp_export.settings import settle
from tests.models.llava_next import make_llava_next, make_llava_onevision
from tests.models.tiny import TinySpec, make_llava

# The state that feeds the projector: -2 leaves the last layer unread, -1 reads all.
MAKERS: dict[str, Callable[[Path], Path]] = {
    "llava": make_llava,
    "llava, two layers": lambda folder: make_llava(folder, TinySpec(feature_layers=(-3, -2))),
    "llava, siglip": lambda folder: make_llava(folder, TinySpec(vision="siglip")),
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
}


def _load(folder: Path, attention: str = "eager") -> Any:
    auto: Any = AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def _reference(model: Any, **overrides: Any) -> VisionReference:
    family = family_for(model.config.model_type)
    plan = family.plan(model.config)
    return VisionReference(model, family, plan, settle(make_recipe("rtn", overrides), family, plan))


def _relevance(model: Any, pixels: np.ndarray, scorer: str) -> np.ndarray:
    """What transformers' attentions of the layer behind the last state that is read say of the patches."""
    attentions = model.model.vision_tower(torch.from_numpy(pixels), output_attentions=True).attentions
    layer = model.config.vision_feature_layer
    weights = attentions[max([layer] if isinstance(layer, int) else layer)].detach().numpy()
    prefix = int(model.config.vision_feature_select_strategy == "default")
    rows = slice(0, 1) if scorer == "cls" else slice(prefix, None)
    return weights[:, :, rows, prefix:].mean(axis=(1, 2))


@pytest.mark.parametrize("scorer", ["cls", "received"])
@pytest.mark.parametrize("name", list(MAKERS))
def test_scores_are_those_of_the_attention_that_the_features_come_from(name: str, scorer: str, tmp_path: Path) -> None:
    model = _load(MAKERS[name](tmp_path / "model"))
    has_cls = model.config.vision_feature_select_strategy == "default"
    reference = _reference(model, keep=0.3, select="topk", semantic=scorer if has_cls else "received")
    calls = reference.draw(seed=1)
    assert sum(len(call["pixel_values"]) for call in calls) >= 2
    for arguments in calls:
        selection = reference.select(arguments)
        relevance = _relevance(model, arguments["pixel_values"], scorer if has_cls else "received")
        if "token_indices" in arguments:
            indices = arguments["token_indices"].reshape(selection.features.shape[1], -1)
            # The smallest grid is not shrunk: a token is one patch.
            relevance = relevance.reshape(1, -1)[:, indices[:, 0]]
        expected = hybrid_token_score(selection.features, relevance, group_size=32)
        # The same numbers, summed in another order.
        np.testing.assert_allclose(selection.scores, expected, atol=1e-6)
        np.testing.assert_array_equal(selection.kept, select_topk(selection.scores, selection.kept.shape[1]))


@pytest.mark.parametrize(
    ("overrides", "kept", "asked"),
    [({"keep": 0.2}, 13, True), ({"keep_range": (0.1, 0.5)}, 8, True), ({"keep": 1.0}, 70, False)],
)
def test_budgets_of_tiles(overrides: dict[str, Any], kept: int, asked: bool, tmp_path: Path) -> None:
    model = _load(make_llava_next(tmp_path / "model"))
    reference = _reference(model, **overrides)
    arguments = reference.draw(seed=0)[0]
    # 40 x 69 pixels in a grid of 5 x 10 patches of 8: 69 / 8 = 8.6, so that 10 - 8 columns are padding. That leaves
    # 5 x 8 tokens beside the overview's 25, and unpruned 5 newlines.
    assert len(arguments["pixel_values"]) == 3
    selection = reference.select(arguments)
    assert selection.kept.shape == (1, kept)
    assert selection.features.shape[1] == (65 if asked else 70)
    feeds = reference.feeds(arguments, selection)
    assert list(feeds) == ["pixel_values", "token_indices"] + ["keep_tokens"] * asked
    if asked:
        np.testing.assert_array_equal(feeds["keep_tokens"], [kept])


@pytest.mark.parametrize("select", ["topk", "dpp", "maxmin"])
def test_other_tokens_than_the_rule_keeps_are_seen_and_ties_are_none(select: str, tmp_path: Path) -> None:
    reference = _reference(_load(make_llava(tmp_path / "model")), keep=0.3, select=select)
    selection = reference.select(reference.draw(seed=0)[0])
    assert selection.kept.shape[1] == 8
    assert reference.agreement(selection, selection.kept) == 1.0
    worst = np.argsort(selection.scores, axis=1)
    left_out = [[token for token in row if token not in kept] for row, kept in zip(worst, selection.kept, strict=True)]
    wrong = selection.kept.copy()
    wrong[0, 3] = left_out[0][0]
    # One of eight, or more: what follows a choice depends on it.
    assert reference.agreement(selection, np.sort(wrong, axis=1)) <= 1 - 1 / wrong.size
    # A token that is left out becomes the same as the kept one of the lowest score, up to rounding.
    twin, token = left_out[0][-1], selection.kept[0, selection.scores[0, selection.kept[0]].argmin()]
    features, scores = selection.features.copy(), selection.scores.copy()
    features[0, twin], scores[0, twin] = features[0, token] * (1 + 1e-6), scores[0, token] - 1e-6
    twins = Selection(select_tokens(select, features, scores, 8), scores, features)  # type: ignore[arg-type]
    (kept,) = {token, twin} & set(twins.kept[0])
    swapped = np.where(twins.kept == kept, token + twin - kept, twins.kept)
    swapped[1] = twins.kept[1]
    assert reference.agreement(twins, np.sort(swapped, axis=1)) == 1.0


def test_attention_that_is_not_returned_is_an_error(tmp_path: Path) -> None:
    reference = _reference(_load(make_llava(tmp_path / "model"), attention="sdpa"), semantic="cls")
    with pytest.raises(ParityError, match="no attention of 25 patches was seen"):
        reference.select(reference.draw(seed=0)[0])
