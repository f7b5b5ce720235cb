"""The main job end to end on tiny random checkpoints, against Hugging Face transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qavp_export import QavpModel, pipeline
from qavp_export.errors import ParityError
from qavp_export.manifest import Manifest
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes import place_qdq, two_level_scale
from qavp_export.recipe import make_recipe
from qavp_export.verify import verify
from tests.models.tiny import TinySpec, make_llava

ExportTo = Callable[..., Manifest]
VARIANTS = {
    "llama, tied, MQA, sharded": TinySpec(tied=True, kv_heads=1, max_shard_size="40KB", dtype=torch.bfloat16),
    "mistral": TinySpec(decoder="mistral", dtype=torch.float32),
    "qwen2, biases": TinySpec(decoder="qwen2", heads=4, kv_heads=4),
    "siglip, no [CLS]": TinySpec(vision="siglip", image_size=43),
}


def _export(model: Path, target: Path, recipe: str = "rtn", **fields: Any) -> Manifest:
    return pipeline.export(
        model, make_recipe(recipe, fields), target, name=model.name, force=False, progress=lambda *_: None
    )


def _images(count: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def _reference(model: Path) -> tuple[Any, Any]:
    reference: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    return reference, AutoProcessor.from_pretrained(model)


def _without_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


@pytest.mark.parametrize("name", VARIANTS)
def test_unpruned_and_unquantized_equals_hugging_face(tmp_path: Path, name: str) -> None:
    checkpoint = make_llava(tmp_path / "model", VARIANTS[name])
    manifest = _export(checkpoint, tmp_path / "bundle", "none", keep=1.0)
    assert manifest.parity["verdict"] == "PASS"
    reference, processor = _reference(checkpoint)
    questions = ["what is the color of the circle ?", "left or right ?", "a circle"]
    bundle = QavpModel.from_bundle(tmp_path / "bundle")
    images = _images(3)
    texts = [f"<bos> <image> {question} answer" for question in questions]
    answers = bundle.generate_ids(list(images), texts, max_new_tokens=12, chat_template=False)
    for image, text, ids in zip(images, texts, answers, strict=True):
        inputs = processor(images=image, text=text, return_tensors="pt")
        # The runtime never answers with the image placeholder: to the embedding it would mean another image.
        output = reference.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[4])
        output = output[0, inputs["input_ids"].shape[1] :]
        assert _without_eos(ids, 2) == _without_eos(output.tolist(), 2)


def test_pruned_equals_transformers_fed_the_same_tokens(tmp_path: Path, tiny_llava: Path) -> None:
    manifest = _export(tiny_llava, tmp_path / "bundle", "none", keep=0.3)
    # floor(0.3 * 25 + 0.5)
    assert (manifest.vision_tokens.before, manifest.vision_tokens.after) == (25, 8)
    reference, processor = _reference(tiny_llava)
    bundle = QavpModel.from_bundle(tmp_path / "bundle")
    image = _images(1)[0]
    text = "<bos> <image> what is left of the circle ? answer"
    prepared = bundle.prepare(image, text, chat_template=False)
    kept = torch.from_numpy(prepared.kept_indices[0])
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        is_image = inputs["input_ids"][0] == 4
        embeds = reference.get_input_embeddings()(inputs["input_ids"])[0]
        features = torch.stack(list(reference.get_image_features(inputs["pixel_values"]).pooler_output))[0]
        start = int(is_image.nonzero()[0])
        rows = [embeds[:start], features[kept], embeds[start + 25 :]]
        output = reference.generate(
            inputs_embeds=torch.cat(rows)[None], max_new_tokens=10, do_sample=False, suppress_tokens=[4]
        )[0]
    assert len(kept) == 8
    ids = bundle.generate_ids(image, text, max_new_tokens=10, chat_template=False)[0]
    assert _without_eos(ids, 2) == _without_eos(output.tolist(), 2)


@pytest.fixture(scope="module")
def w4a4(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    target = tmp_path_factory.mktemp("w4a4") / "bundle"
    _export(tiny_llava, target, keep=0.3)
    return target


def test_w4a4_passes_parity_and_says_what_it_realized(w4a4: Path) -> None:
    manifest = Manifest.read(w4a4)
    assert manifest.parity["verdict"] == "PASS"
    assert manifest.parity["kept_indices_equal"] == 1.0
    # Activations are compared code by code and logits to float rounding, though rounding to 4 bits amplifies it.
    assert manifest.parity["codes_agreement"] > 0.9999
    assert manifest.parity["cosine"] > 1 - 1e-9
    decoder = {name: value for name, value in manifest.precision.items() if name.startswith("decoder:")}
    # q, k, v, o, gate, up, down in each of two layers.
    assert sum(value == "w4a4" for value in decoder.values()) == 14
    assert decoder["decoder:/model/layers.0/attn/q_proj/MatMul"] == "w4a4"
    assert decoder["decoder:/lm_head/MatMul"] == "w8a16"
    vision = [value for name, value in manifest.precision.items() if name.startswith("vision_encoder:")]
    assert set(vision) == {"float16"}


def test_the_bundle_verifies_and_keeps_what_the_runtime_needs(w4a4: Path) -> None:
    manifest = verify(w4a4)
    assert {"config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"} <= {
        entry.path for entry in manifest.files
    }
    assert [(spec.name, spec.shape) for spec in manifest.components["vision_encoder"].outputs] == [
        ("image_features", ["batch", 8, 96]),
        ("kept_indices", ["batch", 8]),
    ]
    decoder = manifest.components["decoder"]
    assert [spec.name for spec in decoder.inputs][:5] == [
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [spec.shape for spec in decoder.outputs][:2] == [["batch", "sequence", 67], ["batch", 2, "total", 16]]


def test_same_recipe_and_checkpoint_give_identical_bytes(tmp_path: Path, tiny_llava: Path, w4a4: Path) -> None:
    again = _export(tiny_llava, tmp_path / "again", keep=0.3)
    assert again.files == Manifest.read(w4a4).files


# transformers writes `language_model.model.` and `vision_tower.encoder.`; these are the other two styles in use.
NAME_STYLES = {
    "llava-hf/llava-1.5-7b-hf": {"vision_tower.": "vision_tower.vision_model."},
    "transformers 4.5x": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


@pytest.mark.parametrize("style", NAME_STYLES)
def test_every_name_style_gives_identical_graphs(tmp_path: Path, tiny_llava: Path, w4a4: Path, style: str) -> None:
    renamed_folder = tmp_path / "renamed"
    shutil.copytree(tiny_llava, renamed_folder)
    renamed = {}
    for name, tensor in safetensors.torch.load_file(tiny_llava / "model.safetensors").items():
        old, new = next((pair for pair in NAME_STYLES[style].items() if name.startswith(pair[0])), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    safetensors.torch.save_file(renamed, renamed_folder / "model.safetensors", metadata={"format": "pt"})
    assert "vision_tower.vision_model.pre_layrnorm.bias" in {name.removeprefix("model.") for name in renamed}
    manifest = _export(renamed_folder, tmp_path / "bundle", keep=0.3)
    assert manifest.files == Manifest.read(w4a4).files


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


def test_original_positions_reach_the_decoder(tmp_path: Path, tiny_llava: Path) -> None:
    _export(tiny_llava, tmp_path / "bundle", "none", keep=0.2, positions="original")
    bundle = QavpModel.from_bundle(tmp_path / "bundle")
    prepared = bundle.prepare(_images(1)[0], "<bos> <image> left", chat_template=False)
    kept = prepared.kept_indices[0]
    # <bos> is 0; image tokens keep 1 + their index in the grid of 25; the word follows at 26.
    assert prepared.position_ids[0].tolist() == [0, *(1 + kept).tolist(), 26]


def test_parity_catches_a_graph_that_computes_something_else(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one_step(values: np.ndarray, group_size: int) -> TwoLevel:
        right = quantize_two_level(values, group_size)
        return TwoLevel(right.codes, np.roll(right.multipliers, 1, axis=-1), right.steps)

    # The graph's weights get the multipliers of the neighbouring group; the reference does not.
    monkeypatch.setattr(place_qdq, "quantize_two_level", off_by_one_step)
    with pytest.raises(ParityError, match="logits differ by"):
        _export(tiny_llava, tmp_path / "bundle", keep=0.3)
    assert list(tmp_path.iterdir()) == []


def test_parity_catches_activations_on_another_grid(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Amplitudes divided by 8 rather than 7: values clip, most codes change.
    monkeypatch.setattr(two_level_scale, "_BODY", two_level_scale._BODY.replace("float = 7.0", "float = 8.0"))
    with pytest.raises(ParityError, match="of the 4-bit activations differ"):
        _export(tiny_llava, tmp_path / "bundle", keep=0.3)


def test_several_images_batches_and_streaming(w4a4: Path) -> None:
    bundle = QavpModel.from_bundle(w4a4)
    one, two, three = _images(3)
    batch = bundle.generate([[one, two], None, three], ["left ?", "what is a circle ?", "right"], max_new_tokens=6)
    alone = [
        bundle.generate([one, two], "left ?", max_new_tokens=6),
        bundle.generate(None, "what is a circle ?", max_new_tokens=6),
        bundle.generate(three, "right", max_new_tokens=6),
    ]
    assert batch == alone
    assert "".join(bundle.generate(three, "right", max_new_tokens=6, stream=True)) == alone[2]


def test_the_manifest_holds_no_path_of_this_machine(w4a4: Path, tiny_llava: Path) -> None:
    for file in (w4a4 / "qavp.json", *w4a4.glob("*/model.onnx")):
        content = file.read_bytes()
        assert str(tiny_llava.parent).encode() not in content
        assert b"site-packages" not in content
    assert json.loads((w4a4 / "qavp.json").read_text())["source"] == "tiny-llava"
