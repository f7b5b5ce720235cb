"""The checkpoint's own processor for every family, without torch, against transformers' classes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from qavp_export.errors import BundleError, ImageError, PromptError
from qavp_export.manifest import VisionTokens
from qavp_export.runtime.processors import load_processor
from qavp_export.runtime.prompts import PromptEncoder
from tests.models.words import save_parts, word_tokenizer
from tests.runtime.processors import FAMILIES, FRAME, SIDE, TEMPLATE, image_text, picture, write_processor

# What an image of 30x40 pixels becomes in the prompt, by hand from the definitions of the families.
TILE = "<image> " * 4
ROWS = f"{FRAME[0]} <row_1_col_1> {TILE} {FRAME[0]} <row_1_col_2> {TILE} {FRAME[0]} <row_2_col_1> {TILE} {FRAME[0]} "
EXPANDED = {
    "llava": "<image> " * 16,
    "vipllava": "<image> " * 16,
    # 56x56 fits best: 56/40 * 30 = 42 of 56 rows show the image, 6 of 8 rows of patches; 8 and a newline in each.
    "llava_next": "<image> " * (16 + 6 * 9),
    "llava_onevision": "<image> " * (16 + 6 * 9),
    # The longer edge becomes 56, both are rounded up to 56: 2x2 tiles and the whole image.
    "idefics3": f"{ROWS}<row_2_col_2> {TILE} {FRAME[0]} {FRAME[1]} {TILE} {FRAME[0]}",
    # Of the grids with at most 4 tiles, 4:3 is closest to 1:1.
    "internvl": f"<img> {TILE} </img>",
    "gemma3": f"<boi> {TILE} <eoi>",
    "paligemma": "<image> " * 16,
    # 30x40 is rounded up to 35x42: 5 rows of 6.
    "pixtral": "[IMG] " * 6 + ("[IMG_BREAK] " + "[IMG] " * 6) * 4 + "[IMG_END]",
    # Patches are merged 2x2: 42x42, 3 rows of 3.
    "mistral3": "[IMG] " * 3 + ("[IMG_BREAK] " + "[IMG] " * 3) * 2 + "[IMG_END]",
}
EXPANDED["smolvlm"] = EXPANDED["idefics3"]
# AutoProcessor needs torchvision for these.
WITH_VIDEO = {"llava_onevision", "internvl", "smolvlm", "pixtral", "mistral3"}

SCRIPT = """
import json, sys

for name in ("torch", "torchvision", "num2words", "onnx"):
    sys.modules[name] = None

import numpy as np
from pathlib import Path
from PIL import Image
from qavp_export.runtime.processors import load_processor

result = {}
for folder, token in json.loads(sys.argv[1]).items():
    processor = load_processor(Path(folder))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    outputs = processor(text=[f"w51 {token} w52"], images=[[Image.fromarray(pixels)]])
    result[Path(folder).name] = outputs["input_ids"][0]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("processors")
    return {family: write_processor(root / family, family) for family in FAMILIES}


def encoder(folder):
    tokens = VisionTokens(None, None, "<image>", 4, "contiguous", keep=1.0)
    return PromptEncoder(load_processor(folder), tokens, {})


def test_every_family_without_torch(folders):
    given = json.dumps({str(folder): image_text(family) for family, folder in folders.items()})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, given], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    for family, folder in folders.items():
        # PaliGemma's processor writes what comes behind the images itself.
        text = f"w51 {EXPANDED[family]} {'<bos>' if family == 'paligemma' else ''} w52"
        expected = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
        assert got[family] == expected, family


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITH_VIDEO))
def test_same_as_autoprocessor(folders, family):
    ours, theirs = load_processor(folders[family]), AutoProcessor.from_pretrained(folders[family], backend="pil")
    assert type(ours) is type(theirs)
    token = image_text(family)
    images = [picture(30, 40), picture(50, 23, seed=1)]
    expected = theirs(text=[f"{token} w51 {token} w52"], images=[images])
    got = ours(text=[f"{token} w51 {token} w52"], images=[images])
    assert got["input_ids"] == expected["input_ids"]
    for actual, wanted in zip(got["pixel_values"], expected["pixel_values"], strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_pixtral_as_in_transformers(folders, family, monkeypatch):
    # Its module imports torchvision for a function that the PIL module has, too.
    pil = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    monkeypatch.setitem(sys.modules, "transformers.models.pixtral.image_processing_pixtral", pil)
    name = "transformers.models.pixtral.processing_pixtral"
    monkeypatch.delitem(sys.modules, name, raising=False)
    kind = importlib.import_module(name).PixtralProcessor
    monkeypatch.delitem(sys.modules, name)
    folder = folders[family]
    merge = FAMILIES[family][3]["spatial_merge_size"]
    theirs = kind(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
        patch_size=7,
        spatial_merge_size=merge,
    )
    images = [picture(30, 40), picture(61, 23, seed=1), picture(1, 9, seed=2)]
    given = {"text": ["[IMG] w51 [IMG] [IMG] w52"], "images": [images], "images_kwargs": {"do_pad": False}}
    expected = theirs(**given, return_tensors=None)
    got = load_processor(folder)(**given)
    assert got["input_ids"] == expected["input_ids"]
    assert got["image_sizes"] == expected["image_sizes"]
    for actual, wanted in zip(got["pixel_values"], expected["pixel_values"], strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_smolvlm_writes_what_its_own_processor_writes(folders, monkeypatch):
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    monkeypatch.setattr(module, "num2words", object())  # read for video alone
    kind = type("ImageOnly", (module.SmolVLMProcessor,), {"get_attributes": lambda _: ["image_processor", "tokenizer"]})
    folder = folders["smolvlm"]
    ours = load_processor(folder)
    theirs = kind(ours.image_processor, AutoTokenizer.from_pretrained(folder), None, image_seq_len=4)
    images = [picture(30, 40), picture(12, 23, seed=1)]
    text = ["<image> w51 <image> w52"]
    assert ours(text=text, images=[images])["input_ids"] == theirs(text=text, images=[images])["input_ids"]


@pytest.mark.parametrize("given", [{}, {"patch_size": 7, "vision_feature_select_strategy": "default"}])
def test_older_llava_takes_the_rest_from_the_models_configuration(tmp_path, given):
    save_parts(tmp_path, None, FAMILIES["llava"][2], word_tokenizer(["<image>"], 100), TEMPLATE, **given)
    vision = {"model_type": "clip_vision_model", "patch_size": 7, "image_size": SIDE}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": vision}))
    processor = load_processor(tmp_path)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 1)
    outputs = processor(text=["<image> w51"], images=[[picture(30, 40)]])
    assert outputs["input_ids"][0].count(4) == 16


def test_older_llava_with_a_tower_without_cls(tmp_path):
    save_parts(tmp_path, None, FAMILIES["llava"][2], word_tokenizer(["<image>"], 100), TEMPLATE)
    vision = {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": SIDE}
    config = {"model_type": "llava", "vision_config": vision, "vision_feature_select_strategy": "full"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outputs = load_processor(tmp_path)(text=["<image> w51"], images=[[picture(30, 40)]])
    assert outputs["input_ids"][0].count(4) == 4


def test_the_processors_template_wins_over_the_text_models(tmp_path):
    folder = write_processor(tmp_path / "both", "llava")
    assert encoder(folder).chat_template == TEMPLATE.replace("IMAGE", "<image>")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "mine"}))
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "the text model's"}))
    assert encoder(folder).chat_template == "mine"


@pytest.mark.parametrize("name", ["Nonsense", "LlavaConfig", "AutoProcessor"])
def test_unknown_processor_class(tmp_path, name):
    folder = write_processor(tmp_path / "odd", "llava")
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name}))
    with pytest.raises(BundleError, match=rf"has no processor '{name}'"):
        load_processor(folder)


def test_text_that_a_processor_refuses(folders):
    with pytest.raises(PromptError, match=r"refuses the prompt .*`images` are expected"):
        encoder(folders["paligemma"]).encode("w51", [], False)


def test_image_that_a_processor_refuses_is_named(folders, monkeypatch):
    encode = encoder(folders["llava"])
    kind = type(encode._processor.image_processor)
    resize = kind.resize

    def fail(self, image, *args, **kwargs):
        if image.shape[-1] == 23:
            raise ValueError("too\nthin")
        return resize(self, image, *args, **kwargs)

    monkeypatch.setattr(kind, "resize", fail)
    images = [picture(30, 40), picture(50, 23)]
    with pytest.raises(ImageError, match=r"image <Image> \(23x50\) cannot be processed \(too thin\)"):
        encode.encode("<image> <image>", images, False)


@pytest.mark.parametrize("family", ["gemma3", "pixtral"])
def test_either_image_token_is_refused_in_a_users_text(folders, family):
    encode = encoder(folders[family])
    for token in (image_text(family), "<image>"):
        with pytest.raises(PromptError, match="stands for an image"):
            encode.encode(f"w51 {token}", [picture(30, 40)], True)
