"""From prompts of every layout to what the decoder reads, with encoders that keep what they are told to.

The unpruned ids are those of transformers' processor; which of them stay, and where, is worked out by hand.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qavp_export.errors import BundleError, ImageError, InputError, PromptError
from qavp_export.manifest import VisionTokens
from qavp_export.runtime.layouts import load_layout
from qavp_export.runtime.preparation import Preparer
from tests.runtime.processors import (
    CONTEXT,
    FAMILIES,
    HIDDEN,
    TILE_SETTINGS,
    RecordingEncoders,
    make_manifest,
    picture,
    write_processor,
)

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    return {family: write_processor(root / family, family) for family in FAMILIES}


def image_token_id(folder):
    ids = {"gemma3": "<image>", "pixtral": "[IMG]", "mistral3": "[IMG]"}
    return ids.get(folder.name, "<image>")


def preparer(folder, kept, *inputs, **tokens):
    """A preparer whose vision encoder takes `inputs` and keeps `kept`, unit by unit."""
    token_id = load_id(folder, image_token_id(folder))
    vision = VisionTokens(
        **{"before": None, "after": None, "positions": "contiguous", "keep": 0.5, **tokens},
        image_token=image_token_id(folder),
        image_token_id=token_id,
    )
    encoders = RecordingEncoders(token_id, kept)
    return Preparer(folder, make_manifest(vision, *inputs), encoders), encoders


def load_id(folder, token):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)


def words(preparer, prepared, row=0):
    ids = prepared.input_ids[row][prepared.attention_mask[row] == 1]
    return " ".join(preparer.tokenizer.convert_ids_to_tokens(ids))


def positions(prepared, row=0):
    return prepared.position_ids[row][prepared.attention_mask[row] == 1].tolist()


def sources(prepared):
    """Unit and token that each placeholder of the batch shows."""
    shown = prepared.inputs_embeds[prepared.inputs_embeds[..., 2] == 0]
    return [(int(unit), int(token)) for unit, token, _ in shown]


def pairs(kept):
    return [(unit, token) for unit, indices in enumerate(kept, start=1) for token in indices]


# --- grid ---------------------------------------------------------------------------------------------------------


def test_tiles_of_a_grid_are_units_of_one_call(folders):
    # Idefics3: 30x40 is cut into 2x2 tiles, 10x40 into 1x2, and both are seen whole: 5 + 3 units of 4 tokens.
    kept = [[0, 1], [2, 3], [0, 3], [1, 2], [0, 2], [1, 3], [0, 1], [2, 3]]
    images = [picture(30, 40), picture(10, 40)]
    prepare, encoders = preparer(folders["idefics3"], kept, before=4, after=2)
    prepared = prepare.prepare(["<image> w51 <image> w52"], [images], chat_template=False)
    (call,) = encoders.calls
    assert set(call) == {"pixel_values"}
    assert call["pixel_values"].dtype == np.float32
    frame, two = "<fake_token_around_image>", "<image> <image>"
    cells = [f"{frame} <row_{row}_col_{column}> {two}" for row in (1, 2) for column in (1, 2)]
    whole = f"{frame} <global-img> {two} {frame}"
    assert words(prepare, prepared) == " ".join([*cells, whole, "w51", *cells[:2], whole, "w52"])
    assert sources(prepared) == pairs(kept)
    assert [indices.tolist() for indices in prepared.kept_indices] == kept
    assert prepared.unpruned_tokens == (4,) * 8
    assert prepared.images_per_prompt == (2,)
    outputs = prepare._encoder._processor(text=["<image> w51 <image> w52"], images=[images])
    np.testing.assert_array_equal(call["pixel_values"], outputs["pixel_values"][0])


def test_original_positions_are_those_of_the_processors_ids(folders):
    kept = [[0, 1], [2, 3], [0, 3], [1, 2], [0, 2]]
    prepare, _ = preparer(folders["idefics3"], kept, before=4, after=2, positions="original")
    prepared = prepare.prepare(["w51 <image> w52"], [[picture(30, 40)]], chat_template=False)
    full = prepare._encoder._processor(text=["w51 <image> w52"], images=[[picture(30, 40)]])["input_ids"][0]
    token = load_id(folders["idefics3"], "<image>")
    places = [place for place, found in enumerate(full) if found == token]
    gone = {places[4 * unit + index] for unit in range(5) for index in range(4) if index not in kept[unit]}
    assert positions(prepared) == [place for place in range(len(full)) if place not in gone]
    assert prepared.input_ids[0].tolist() == [full[place] for place in positions(prepared)]
    assert prepared.next_positions.tolist() == [len(full)]


def test_batches_with_different_numbers_of_images(folders):
    kept = [[1], [3], [0]]
    prepare, encoders = preparer(folders["gemma3"], kept, before=4, after=1, positions="original")
    images = [[picture(9, 9)], [], [picture(30, 40, seed=1), picture(40, 30, seed=2)]]
    prepared = prepare.prepare(["w51 <boi>", "w52", "<boi> w53 <boi>"], images, chat_template=False)
    assert len(encoders.calls) == 1
    assert [words(prepare, prepared, row) for row in range(3)] == [
        "w51 <boi> <image> <eoi>",
        "w52",
        "<boi> <image> <eoi> w53 <boi> <image> <eoi>",
    ]
    assert [positions(prepared, row) for row in range(3)] == [
        [0, 1, 3, 6],
        [0],
        [0, 4, 5, 6, 7, 8, 12],
    ]
    assert prepared.next_positions.tolist() == [7, 1, 13]
    assert sources(prepared) == pairs(kept)
    # 1 for image tokens alone, padding and the tokens around images are 0.
    assert prepared.token_type_ids.tolist() == [[0, 0, 0, 0, 0, 1, 0], [0] * 7, [0, 1, 0, 0, 0, 1, 0]]


def test_text_alone_needs_no_vision_encoder(folders):
    for family, tokens in [
        ("internvl", {"before": 4, "after": 2}),
        ("llava_next", {"layout": "tiles", "layout_settings": TILE_SETTINGS}),
        ("pixtral", {"layout": "native", "layout_settings": {"patch_size": 7, "spatial_merge_size": 1}}),
    ]:
        prepare, encoders = preparer(folders[family], [], **tokens)
        prepared = prepare.prepare(["w51", "w52 w53"], [[], []], chat_template=False)
        assert encoders.calls == []
        assert prepared.kept_indices == prepared.unpruned_tokens == ()
        assert prepared.attention_mask.tolist() == [[0, 1], [1, 1]]


def test_paligemmas_processor_places_bos_behind_the_image(folders):
    prepare, _ = preparer(folders["paligemma"], [[3, 8]], before=16, after=2, positions="original")
    prepared = prepare.prepare(["<image> w51"], [[picture(30, 40)]], chat_template=False)
    assert words(prepare, prepared) == "<image> <image> <bos> w51"
    assert positions(prepared) == [3, 8, 16, 17]


def test_chat_template_puts_the_familys_image_token(folders):
    prepare, _ = preparer(folders["gemma3"], [[2]], before=4, after=1)
    prepared = prepare.prepare(["w51"], [[picture(9, 9)]], chat_template=True)
    assert words(prepare, prepared) == "<bos> <boi> <image> <eoi> w51 w59"
    assert prepare.image_token == "<boi>"


# --- tiles --------------------------------------------------------------------------------------------------------

# 14x28 fills the grid of 28x56: overview (16 tokens) and 4 rows of 8, each behind which is a newline.
WIDE_ROWS = [16 + 9 * row + column for row in range(4) for column in range(8)]
WIDE_TOKENS = 16 + 4 * 8


def tile_preparer(folder, kept, *inputs, **tokens):
    return preparer(folder, kept, "token_indices", *inputs, layout="tiles", layout_settings=TILE_SETTINGS, **tokens)


def test_a_tile_set_is_one_unit_and_newlines_are_no_candidates(folders):
    kept = [[0, 15, 16, 23, 24, 47]]
    tokens = {"newlines": "dropped", "positions": "original", "keep": 0.125}
    prepare, encoders = tile_preparer(folders["llava_next"], kept, "keep_tokens", **tokens)
    prepared = prepare.prepare(["w51 <image> w52"], [[picture(14, 28)]], chat_template=False)
    (call,) = encoders.calls
    assert set(call) == {"pixel_values", "token_indices", "keep_tokens"}
    assert call["pixel_values"].shape == (3, 3, 28, 28)
    assert call["keep_tokens"].tolist() == [6]  # 0.125 * 48
    # Row by row: the first row of the left tile, then of the right one.
    assert call["token_indices"].tolist()[16:24] == [16, 17, 18, 19, 32, 33, 34, 35]
    assert len(call["token_indices"]) == WIDE_TOKENS
    assert max(call["token_indices"]) < 48
    assert positions(prepared) == [0, 1, 16, 17, 24, 26, 1 + WIDE_ROWS[-1], 1 + 16 + 36]
    assert prepared.next_positions.tolist() == [1 + 16 + 36 + 1]
    assert prepared.unpruned_tokens == (WIDE_TOKENS,)
    assert sources(prepared) == pairs(kept)


def test_an_unpruned_tile_set_has_its_newlines(folders):
    kept = [list(range(16 + 36))]
    prepare, encoders = tile_preparer(folders["llava_next"], kept, newlines="kept", keep=1.0)
    prepared = prepare.prepare(["w51 <image> w52"], [[picture(14, 28)]], chat_template=False)
    (call,) = encoders.calls
    assert set(call) == {"pixel_values", "token_indices"}
    assert np.flatnonzero(call["token_indices"] == 48).tolist() == [24, 33, 42, 51]
    outputs = prepare._encoder._processor(text=["w51 <image> w52"], images=[[picture(14, 28)]])
    assert prepared.input_ids.tolist() == outputs["input_ids"]
    np.testing.assert_array_equal(call["pixel_values"], outputs["pixel_values"][0])


def test_images_of_different_sizes_are_tiled_one_by_one(folders):
    # 14x28: 48 tokens. 56x28: 8 rows of 4 behind the overview. 30x40: 56x56, 6 rows of 8 without padding.
    kept = [list(range(0, 48, 4)), list(range(0, 48, 4)), list(range(3, 64, 4))]
    prepare, encoders = tile_preparer(folders["llava_next"], kept, "keep_tokens", newlines="dropped", keep=0.25)
    images = [[picture(14, 28), picture(56, 28)], [], [picture(30, 40)]]
    prepared = prepare.prepare(["<image> <image>", "w51", "w52 <image>"], images, chat_template=False)
    assert [call["pixel_values"].shape[0] for call in encoders.calls] == [3, 3, 5]
    assert prepared.unpruned_tokens == (48, 48, 64)
    assert prepared.input_ids.shape == (3, 24)
    assert sources(prepared) == pairs(kept)
    for call, image in zip(encoders.calls, [image for group in images for image in group], strict=True):
        alone = prepare._encoder._processor.image_processor([image], return_tensors="np")
        np.testing.assert_array_equal(call["pixel_values"], alone["pixel_values"][0])


def test_onevision_shows_images_that_share_a_prompt_as_one_tile_each(folders):
    settings = TILE_SETTINGS | {"max_tiles": 9}
    tokens = {"layout": "tiles", "layout_settings": settings, "newlines": "dropped", "keep": 0.5}
    kept = [list(range(0, 16, 2)), list(range(1, 16, 2)), list(range(0, 64, 2))]
    inputs = ("token_indices", "token_weights", "keep_tokens")
    prepare, encoders = preparer(folders["llava_onevision"], kept, *inputs, positions="original", **tokens)
    images = [[picture(30, 40), picture(14, 28)], [picture(30, 40)]]
    prepared = prepare.prepare(["<image> <image> w51", "<image> w51"], images, chat_template=False)
    assert [call["pixel_values"].shape[0] for call in encoders.calls] == [1, 1, 5]
    assert [call["token_indices"].shape for call in encoders.calls] == [(16, 4), (16, 4), (64, 4)]
    assert [call["token_weights"].shape for call in encoders.calls] == [(16, 4), (16, 4), (64, 4)]
    assert prepared.unpruned_tokens == (16, 16, 64)
    # Each of the two has a newline behind its 16 tokens.
    assert positions(prepared, 0) == [*range(0, 16, 2), *range(18, 33, 2), 34]
    assert prepared.next_positions.tolist() == [35, 16 + 6 * 9 + 1]
    assert sources(prepared) == pairs(kept)


# --- native -------------------------------------------------------------------------------------------------------

NATIVE = {"layout": "native", "layout_settings": {"patch_size": 7, "spatial_merge_size": 1}}


def test_unpruned_native_images_are_as_the_processor_has_them(folders):
    kept = [list(range(30)), list(range(8))]
    prepare, encoders = preparer(folders["pixtral"], kept, keep=1.0, **NATIVE)
    images = [[picture(30, 40), picture(14, 28)]]
    prepared = prepare.prepare(["[IMG] w51 [IMG]"], images, chat_template=False)
    assert [call["pixel_values"].shape for call in encoders.calls] == [(1, 3, 35, 42), (1, 3, 14, 28)]
    options = {"images_kwargs": {"do_pad": False}}
    outputs = prepare._encoder._processor(text=["[IMG] w51 [IMG]"], images=images, **options)
    assert prepared.input_ids.tolist() == outputs["input_ids"]
    for call, pixels in zip(encoders.calls, outputs["pixel_values"], strict=True):
        np.testing.assert_array_equal(call["pixel_values"][0], pixels)
    assert sources(prepared) == pairs(kept)


@pytest.mark.parametrize("row_break", [True, False])
def test_a_row_break_goes_with_the_last_token_of_its_row(folders, row_break):
    folder = folders["pixtral"]
    settings = dict(NATIVE["layout_settings"])
    if row_break:
        settings["row_break_token_id"] = load_id(folder, "[IMG_BREAK]")
    # 21x28: 3 rows of 4. Then 14x21: 2 rows of 3, nothing kept of the last.
    kept = [[0, 3, 9], [0, 2]]
    prepare, _ = preparer(
        folder, kept, "keep_tokens", layout="native", layout_settings=settings, positions="original", keep=0.25
    )
    prepare._layout.kept = lambda count, _: {12: 3, 6: 2}[count]
    prepared = prepare.prepare(["w51 [IMG] w52 [IMG]"], [[picture(21, 28), picture(14, 21)]], chat_template=False)
    empty = [] if row_break else [10]
    assert positions(prepared) == [0, 1, 4, 5, *empty, 12, 15, 16, 17, 19, 20, 24]
    middle = "" if row_break else "[IMG_BREAK] "
    assert words(prepare, prepared) == (
        f"w51 [IMG] [IMG] [IMG_BREAK] {middle}[IMG] [IMG_END] w52 [IMG] [IMG] [IMG_BREAK] [IMG_END]"
    )
    assert prepared.next_positions.tolist() == [25]
    assert sources(prepared) == pairs(kept)


def test_merged_patches_make_fewer_native_tokens(folders):
    settings = {"patch_size": 7, "spatial_merge_size": 2}
    prepare, encoders = preparer(
        folders["mistral3"], [[4, 8]], "keep_tokens", layout="native", layout_settings=settings, keep=0.25
    )
    prepared = prepare.prepare(["[IMG] w51"], [[picture(30, 40)]], chat_template=False)
    assert encoders.calls[0]["keep_tokens"].tolist() == [2]  # floor(0.25 * 9 + 0.5)
    assert prepared.unpruned_tokens == (9,)


# --- budgets and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(None, 8), (0.1, 2), (0.9, 14), (0.02, 1)])
def test_budget_chosen_at_run_time(folders, keep, kept):
    tokens = {"before": 16, "keep": 0.5, "keep_range": [0.02, 0.9]}
    prepare, encoders = preparer(folders["llava"], [list(range(kept))] * 2, "keep_tokens", **tokens)
    prepared = prepare.prepare(["<image> <image>"], [[picture(9, 9)] * 2], chat_template=False, keep=keep)
    assert encoders.calls[0]["keep_tokens"].tolist() == [kept]
    assert prepared.input_ids.shape == (1, 2 * kept)


@pytest.mark.parametrize("keep", [0.01, 0.91, float("nan"), -1, 2])
def test_budget_out_of_range(folders, keep):
    prepare, encoders = preparer(folders["llava"], [], "keep_tokens", before=16, keep_range=[0.02, 0.9])
    with pytest.raises(InputError, match=r"keep is .*; the bundle serves 0.02 to 0.9"):
        prepare.prepare(["<image>"], [[picture(9, 9)]], chat_template=False, keep=keep)
    assert encoders.calls == []


def test_budget_of_a_static_bundle(folders):
    prepare, _ = preparer(folders["llava"], [], before=16, after=8)
    with pytest.raises(InputError, match=r"keeps 0.5 of the vision tokens .* --keep LOW:HIGH"):
        prepare.prepare(["<image>"], [[picture(9, 9)]], chat_template=False, keep=0.25)


def test_processor_that_does_not_fit_the_model(folders):
    prepare, encoders = preparer(folders["llava"], [], before=25, after=8)
    with pytest.raises(BundleError, match=r"writes 16 image tokens where the vision encoder yields 25"):
        prepare.prepare(["<image>"], [[picture(9, 9)]], chat_template=False)
    assert encoders.calls == []


def test_context_is_checked_before_images_are_encoded(folders):
    prepare, encoders = tile_preparer(folders["llava_next"], [], "keep_tokens", newlines="dropped", keep=0.5)
    # 24 of 48 tokens each.
    count = CONTEXT // 24 + 1
    with pytest.raises(PromptError, match=rf"has {24 * count} tokens \({24 * count} of its tokens for images\)"):
        prepare.prepare(["<image> " * count], [[picture(14, 28)] * count], chat_template=False)
    assert encoders.calls == []


def test_row_breaks_that_go_leave_room_in_the_context(folders):
    folder = folders["pixtral"]
    settings = NATIVE["layout_settings"] | {"row_break_token_id": load_id(folder, "[IMG_BREAK]")}

    def prepare(kept, context):
        made, _ = preparer(folder, [kept], "keep_tokens", layout="native", layout_settings=settings, keep=1 / 12)
        decoder = dataclasses.replace(made._manifest.decoder, context_length=context)
        made._manifest = dataclasses.replace(made._manifest, decoder=decoder)
        # 21x28: 3 rows of 4; one token stays, one break or none, and the end.
        return made.prepare(["[IMG] w51"], [[picture(21, 28)]], chat_template=False)

    assert prepare([8], 4).input_ids.shape == (1, 3)
    with pytest.raises(PromptError, match="has 4 tokens"):
        prepare([0], 4)


def test_tiles_of_another_size(folders):
    prepare, _ = tile_preparer(folders["llava_next"], [], newlines="kept", keep=1.0)
    prepare._layout.pixel_shape = ["tiles", 3, 56, 56]
    with pytest.raises(ImageError, match=r"\(28x14\) gives .*\[3, 3, 28, 28\], the bundle takes .*56x56"):
        prepare.prepare(["<image>"], [[picture(14, 28)]], chat_template=False)


def test_layout_that_is_not_known():
    tokens = VisionTokens(4, 2, "<image>", 4, "contiguous", keep=0.5)
    manifest = make_manifest(tokens)
    with pytest.raises(BundleError, match=r"layout 'spiral' is not one of grid, tiles, native"):
        load_layout(dataclasses.replace(manifest, vision_tokens=dataclasses.replace(tokens, layout="spiral")))
    with pytest.raises(BundleError, match="no pixel_values"):
        load_layout(dataclasses.replace(manifest, components={}))


def test_features_of_a_single_call_keep_their_shape(folders):
    prepare, encoders = preparer(folders["llava"], [[0], [1]], before=16, after=1)
    seen = []
    embed = encoders.embed
    encoders.embed = lambda ids, features: (seen.append(features.shape), embed(ids, features))[1]
    prepare.prepare(["<image> <image>"], [[picture(9, 9)] * 2], chat_template=False)
    prepare.prepare(["w51"], [[]], chat_template=False)
    assert seen == [(2, 1, HIDDEN), (0, 1, HIDDEN)]
