"""How tiles are packed, against transformers' own packing of features that say where they come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.configuration_llava_next import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches as count_tiles_of_next
from transformers.models.llava_onevision.configuration_llava_onevision import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from qavp_export.runtime.tiles import count_tiles, pack_tiles

# The pinpoints, sizes and patches of the published checkpoints: 336/14 = 24 and 384/14 = 27 patches a side.
NEXT = {"grid_pinpoints": LlavaNextConfig().image_grid_pinpoints, "tile_size": 336, "tile_patches": 24}
ONEVISION = {"grid_pinpoints": LlavaOnevisionConfig().image_grid_pinpoints, "tile_size": 384, "tile_patches": 27}
SIZES = st.tuples(st.integers(8, 4000), st.integers(8, 4000)).filter(lambda size: max(size) <= 40 * min(size))


def _model(layout: dict[str, Any]) -> Any:
    vision = SimpleNamespace(image_size=layout["tile_size"], patch_size=layout["tile_size"] // layout["tile_patches"])
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=layout["grid_pinpoints"]))


def _features(layout: dict[str, Any], tiles: int) -> torch.Tensor:
    """Every token's one channel is its row among the flattened tile tokens."""
    tokens = layout["tile_patches"] ** 2
    return torch.arange(tiles * tokens, dtype=torch.float64).reshape(tiles, tokens, 1)


@settings(max_examples=60)
@given(size=SIZES, newlines=st.booleans())
def test_llava_next_packs_as_transformers_does(size: tuple[int, int], newlines: bool) -> None:
    layout = NEXT | {"max_tiles": None}
    tiles = count_tiles_of_next(size, layout["grid_pinpoints"], layout["tile_size"])
    assert count_tiles(size, layout) == tiles
    features = _features(layout, tiles)
    newline = torch.full((1,), features.numel(), dtype=torch.float64) if newlines else None
    packed, _ = LlavaNextModel.pack_image_features(_model(layout), [features], [size], "default", newline)
    inputs = pack_tiles(size, layout, newlines=newlines)
    assert list(inputs) == ["token_indices"]
    assert inputs["token_indices"].dtype == np.int64
    np.testing.assert_array_equal(inputs["token_indices"], packed[0][:, 0].numpy())


@settings(max_examples=60)
@given(size=SIZES, newlines=st.booleans())
def test_llava_onevision_packs_and_shrinks_as_transformers_does(size: tuple[int, int], newlines: bool) -> None:
    layout = ONEVISION | {"max_tiles": 9}
    tiles = count_tiles_of_next(size, layout["grid_pinpoints"], layout["tile_size"])
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((tiles, layout["tile_patches"] ** 2, 3), generator=generator)
    newline = torch.full((3,), 7.0)
    packed, _ = LlavaOnevisionModel.pack_image_features(
        _model(layout), [features], [size], newline if newlines else None, "anyres_max_9"
    )
    inputs = pack_tiles(size, layout, newlines=newlines)
    assert inputs["token_weights"].dtype == np.float32
    rows = torch.cat([features.flatten(0, 1), newline[None]]).numpy()
    mixed = (rows[inputs["token_indices"]] * inputs["token_weights"][..., np.newaxis]).sum(axis=1)
    # Weights are differences of coordinates up to 27 * 6 in float32, whose last digit is 1e-5; features are below 5.
    np.testing.assert_allclose(mixed, packed[0].numpy(), atol=2e-4)


def test_a_square_of_six_by_six_tiles_is_shrunk_to_nine_tiles() -> None:
    layout = ONEVISION | {"max_tiles": 9}
    indices = pack_tiles((2304, 2304), layout, newlines=True)["token_indices"]
    # The overview's 27 x 27 tokens, and 81 rows of 81 and a newline: 6 * 27 / sqrt(36 / 9) = 81.
    assert indices.shape == (27 * 27 + 81 * 82, 4)
    assert (indices == 37 * 27 * 27).all(axis=1).sum() == 81


@pytest.mark.parametrize("limit", [None, 9])
def test_the_overview_alone_ends_with_one_newline(limit: int | None) -> None:
    layout = ONEVISION | {"max_tiles": limit}
    features = _features(layout, 1)
    newline = torch.full((1,), features.numel(), dtype=torch.float64)
    packed, _ = LlavaOnevisionModel.pack_image_features(_model(layout), [features], [(500, 700)], newline)
    inputs = pack_tiles((500, 700), layout, newlines=True, tiles=1)
    indices = inputs["token_indices"] if limit is None else inputs["token_indices"][:, 0]
    np.testing.assert_array_equal(indices, packed[0][:, 0].numpy())
    assert len(pack_tiles((500, 700), layout, newlines=False, tiles=1)["token_indices"]) == 27 * 27
