"""Batches of every family's processor, split into prompts: the runtime's own preparation of the same is the truth."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from qavp_export.errors import PromptError
from qavp_export.huggingface.inputs import IMAGE_INPUTS, UNREAD_INPUTS, split_batch
from qavp_export.manifest import VisionTokens
from qavp_export.runtime.preparation import Preparer
from qavp_export.runtime.processors import load_processor
from tests.runtime.processors import (
    PATCH,
    TILE_SETTINGS,
    RecordingEncoders,
    image_text,
    make_manifest,
    picture,
    write_processor,
)

GRIDS = {"llava": 16, "idefics3": 4, "smolvlm": 4, "internvl": 4, "gemma3": 4, "paligemma": 16}
TILES = {"llava_next": None, "llava_onevision": 9}
NATIVE = {"pixtral": 1, "mistral3": 2}
# Every unit keeps its tokens 0 and 2.
KEPT = [[0, 2]] * 30


class Case:
    """A family's processor, and the runtime on top of it with encoders that record what they are given."""

    def __init__(self, folder, family):
        write_processor(folder, family)
        self.processor = load_processor(folder)
        self.processor.tokenizer.padding_side = "left"
        placeholder = "[IMG]" if family in NATIVE else "<image>"
        layout = {"layout": "grid", "before": GRIDS.get(family)}
        inputs = ()
        if family in TILES:
            layout = {"layout": "tiles", "before": None, "unit": "tile-set", "newlines": "dropped"}
            layout["layout_settings"] = TILE_SETTINGS | {"max_tiles": TILES[family]}
            inputs = ("token_indices", "token_weights") if TILES[family] else ("token_indices",)
        elif family in NATIVE:
            layout = {"layout": "native", "before": None}
            layout["layout_settings"] = {"patch_size": PATCH, "spatial_merge_size": NATIVE[family]}
        self.tokens = VisionTokens(
            after=2,
            image_token=placeholder,
            image_token_id=self.processor.tokenizer.convert_tokens_to_ids(placeholder),
            positions="original",
            keep=0.5,
            **layout,
        )
        self.folder, self.inputs = folder, inputs

    def preparer(self):
        encoders = RecordingEncoders(self.tokens.image_token_id, KEPT)
        return Preparer(self.folder, make_manifest(self.tokens, *self.inputs), encoders), encoders


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("inputs") / request.param, request.param)


def every(*families):
    return pytest.mark.parametrize("case", families, indirect=True)


def same(actual, expected):
    """Compares dicts of arrays, and dataclasses of them, exactly."""
    actual, expected = (value if isinstance(value, dict) else vars(value) for value in (actual, expected))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@every(*GRIDS, *TILES, *NATIVE)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_the_processor_returns_is_prepared_as_the_prompts_themselves(case, padding):
    image = image_text(case.folder.name)
    texts = [f"w51 {image} w52", f"{image} w53 {image} w54 w55"]
    groups = [[picture(40, 30, 1)], [picture(20, 50, 2), picture(33, 28, 3)]]
    if case.folder.name != "paligemma":  # whose processor refuses prompts without images
        texts.insert(1, "w56")
        groups.insert(1, [])
    ours, our_encoders = case.preparer()
    expected = ours.prepare(texts, groups, chat_template=False)

    case.processor.tokenizer.padding_side = padding
    batch = dict(case.processor(text=texts, images=groups, padding=True, return_tensors="pt"))
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    assert batch.keys() <= IMAGE_INPUTS | UNREAD_INPUTS
    theirs, their_encoders = case.preparer()
    prepared = theirs.prepare_encoded(split_batch(ids, mask, batch, case.tokens))

    # A batch tells tiles apart, but not where the tiles of an image end.
    same(dict(vars(prepared), images_per_prompt=None), dict(vars(expected), images_per_prompt=None))
    assert len(their_encoders.calls) == len(our_encoders.calls) > 0
    for actual, wanted in zip(their_encoders.calls, our_encoders.calls, strict=True):
        same(actual, wanted)


@every("llava", "llava_next")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:, 2:], "prompt 1 has .* image placeholders"),
        (lambda ids: torch.cat([ids, ids], 1), "prompt 1 has .* image placeholders"),
        (lambda ids: ids[:, -1:], r"no placeholders for 1 image"),
    ],
)
def test_placeholders_that_are_not_those_of_the_images(case, change, message):
    batch = dict(case.processor(text=["<image> w51"], images=[[picture(40, 30)]], return_tensors="pt"))
    ids = change(batch.pop("input_ids"))
    del batch["attention_mask"]
    with pytest.raises(PromptError, match=message) as caught:
        split_batch(ids, None, batch, case.tokens)
    assert not re.search(r"\n", str(caught.value))
