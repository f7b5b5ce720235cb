"""The main job end to end on tiny random checkpoints, against Hugging Face transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qavp_export import EngineOptions, QavpModel, pipeline
from qavp_export.calibration import CalibrationItem, demo_calibration
from qavp_export.calibration.prompts import embed_prompts
from qavp_export.errors import RecipeError
from qavp_export.manifest import Manifest
from qavp_export.recipe import make_recipe
from qavp_export.tracing import trace
from qavp_export.verify import verify
from tests.models.tiny import TinySpec, make_llava
from tests.models.traces import Tracer

ExportTo = Callable[..., Manifest]
VARIANTS = {
    "llama, tied, MQA, sharded": TinySpec(tied=True, kv_heads=1, max_shard_size="40KB", dtype=torch.bfloat16),
    "mistral": TinySpec(decoder="mistral", dtype=torch.float32),
    "qwen2, biases": TinySpec(decoder="qwen2", heads=4, kv_heads=4),
    "siglip, no [CLS]": TinySpec(vision="siglip", image_size=43),
}


# Of a logit: float32 sums in another order; rotations add sums of their own. 2e-5 was seen,
# of logits up to 10.
LOGIT_ROUNDING = 1e-4


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the checkpoint of a variant."""
    return cache(lambda name: make_llava(tmp_path_factory.mktemp("variant") / "model", VARIANTS[name]))


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


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("name", VARIANTS)
def test_unpruned_and_unquantized_equals_hugging_face(
    tmp_path: Path, variant: Callable[[str], Path], name: str, rotation: str
) -> None:
    checkpoint = variant(name)
    manifest = _export(checkpoint, tmp_path / "bundle", "none", keep=1.0, rotation=rotation)
    assert manifest.parity["verdict"] == "PASS"
    assert manifest.parity["max_abs"] < LOGIT_ROUNDING
    assert manifest.parity["argmax_agreement"] == 1
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


def test_same_recipe_and_checkpoint_give_identical_bytes(
    tmp_path: Path, tiny_llava: Path, w4a4: Path, monkeypatch: pytest.MonkeyPatch, trace_anew: Tracer
) -> None:
    monkeypatch.setattr(trace, "_trace", trace_anew)
    again = _export(tiny_llava, tmp_path / "again", keep=0.3)
    assert again.files == Manifest.read(w4a4).files


# Layers of the decoder in each precision: 7 in each of two layers, and the head.
REALIZED = {
    "rotate": {"w4a4": 14, "w8a16": 1},
    "gptq": {"w4a4": 14, "w8a16": 1},
    "w4a8": {"w4a8": 14, "w8a16": 1},
    "w4a16": {"w4a16": 14, "w8a16": 1},
    "w8a8": {"w8a8": 14, "w8a16": 1},
}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Callable[[str], Path]:
    """Returns the bundle of a preset."""

    def export(name: str) -> Path:
        target = tmp_path_factory.mktemp(name) / "bundle"
        _export_small(tiny_llava, target, name)
        return target

    return cache(export)


def _export_small(model: Path, target: Path, name: str) -> Manifest:
    # The budget of auto is 0.05: no layer of a model with two is as small.
    fields = {"calibration_samples": 6} | ({"size_budget": 0.2} if name == "auto" else {})
    return _export(model, target, name, keep=0.3, **fields)


def _decoder_precision(manifest: Manifest) -> dict[str, int]:
    values = [value for name, value in manifest.precision.items() if name.startswith("decoder:")]
    return {value: values.count(value) for value in values}


@pytest.mark.parametrize("name", [*REALIZED, "auto"])
def test_every_preset_passes_parity(name: str, preset: Callable[[str], Path]) -> None:
    manifest = Manifest.read(preset(name))
    assert (manifest.parity["verdict"], manifest.parity["reason"]) == ("PASS", "")
    # Codes are compared on the same inputs, and the reference goes on with the graph's: only float rounding is left.
    assert manifest.parity["max_abs"] < LOGIT_ROUNDING
    assert manifest.parity["weights_agreement"] > 0.9999
    if name in REALIZED:
        assert _decoder_precision(manifest) == REALIZED[name]
    modules = [f"model.language_model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("gate", "down")]
    # Rounding to 4 bit changes a random weight by about a tenth, to 8 bit by less than a hundredth.
    low, high = (0.001, 0.02) if name == "w8a8" else (0.001, 0.4)
    assert all(low < manifest.weight_error[module] < high for module in modules)
    assert len(manifest.weight_error) == 15


@pytest.mark.parametrize("name", ["gptq", "auto"])
def test_calibrated_recipes_give_identical_bytes(
    tmp_path: Path, tiny_llava: Path, name: str, preset: Callable[[str], Path]
) -> None:
    again = _export_small(tiny_llava, tmp_path / "again", name)
    first = Manifest.read(preset(name))
    assert again.files == first.files
    assert (again.calibration, again.weight_error) == (first.calibration, first.weight_error)


def test_auto_raises_the_worst_layers_within_its_budget(preset: Callable[[str], Path]) -> None:
    manifest = Manifest.read(preset("auto"))
    assert manifest.calibration is not None
    assert (manifest.calibration["data"], manifest.calibration["prompts"]) == ("shapes_vqa", 6)
    loss = manifest.calibration["sensitivity"]
    # The head is not at 4 bit.
    assert len(loss) == 14
    raised = [name for name, value in manifest.precision.items() if name.startswith("decoder:") and value == "w8a8"]
    assert _decoder_precision(manifest) == {"w4a4": 14 - len(raised), "w8a8": len(raised), "w8a16": 1}
    worst = max(loss, key=loss.__getitem__)
    assert f"decoder:{_node(worst)}" in raised
    # Growth: the raised layers' weights are at most a fifth of all 4-bit weights.
    graph = ir.load(preset("auto") / "decoder/model.onnx").graph
    sizes = {False: 0, True: 0}
    for value in graph.initializers.values():
        if str(value.name).endswith(".codes") and "lm_head" not in str(value.name):
            sizes[value.dtype == ir.DataType.INT8] += math.prod(value.shape.numpy() if value.shape is not None else ())
    assert 0 < sizes[True] <= 0.2 * (sizes[False] + sizes[True])


def _node(module: str) -> str:
    """The node of a linear layer: `model.language_model.layers.0.self_attn.q_proj` and the like."""
    layer, block, part = module.split(".")[-3:]
    return f"/model/layers.{layer}/{'attn' if block == 'self_attn' else block}/{part}/MatMul"


def test_gptq_calibrates_on_pruned_prompts(tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[CalibrationItem, dict[str, np.ndarray]]] = []

    def spy(
        bundle: Path, manifest: Manifest, items: tuple[CalibrationItem, ...], *, token_types: bool
    ) -> Iterator[dict[str, np.ndarray]]:
        for item, prompt in zip(items, embed_prompts(bundle, manifest, items, token_types=token_types), strict=True):
            seen.append((item, prompt))
            yield prompt

    monkeypatch.setattr(pipeline, "embed_prompts", spy)
    _export(tiny_llava, tmp_path / "bundle", "gptq", keep=0.3, calibration_samples=3, seed=5)
    assert tuple(item for item, _ in seen) == demo_calibration(3, 5).items
    # Unoptimized, as calibration runs it: fusions would sum in another order.
    bundle = QavpModel.from_bundle(tmp_path / "bundle", "ort-reference", EngineOptions(graph_optimization="disable"))
    for item, prompt in seen:
        assert item.answer is not None
        # <bos>, 8 of 25 vision tokens, the question, `answer` (the template's) and the answer itself; words are tokens.
        words = len(item.prompt.split()) + len(item.answer.split())
        length = 1 + 8 + words + 1
        assert prompt["inputs_embeds"].shape == (1, length, 96)
        assert prompt["attention_mask"].tolist() == [[1] * length]
        assert prompt["position_ids"].tolist() == [list(range(length))]
        assert prompt["past_key_values.1.value"].shape == (1, 2, 0, 16)
        # What the runtime makes of the same prompt, up to the answer.
        prepared = bundle.prepare(item.images[0], item.prompt)
        asked = prepared.inputs_embeds.shape[1]
        assert asked == length - len(item.answer.split())
        np.testing.assert_allclose(prompt["inputs_embeds"][:, :asked], prepared.inputs_embeds, atol=1e-6)


def test_gptq_stays_closer_to_full_precision_than_rounding(
    tmp_path: Path, tiny_llava: Path, preset: Callable[[str], Path]
) -> None:
    _export(tiny_llava, tmp_path / "float", "none", keep=0.3)
    items = demo_calibration(6, 0).items
    folders = (tmp_path / "float", preset("rotate"), preset("gptq"))
    exact, nearest, gptq = (_logits(folder, items) for folder in folders)
    assert np.linalg.norm(gptq - exact) < 0.9 * np.linalg.norm(nearest - exact)


def _logits(folder: Path, items: tuple[CalibrationItem, ...]) -> np.ndarray:
    """Logits of all tokens of prompts, by the graph as it is written."""
    manifest = Manifest.read(folder)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    runner = ort.InferenceSession(folder / "decoder/model.onnx", options, providers=["CPUExecutionProvider"])
    return np.concatenate([runner.run(["logits"], feeds)[0][0] for feeds in embed_prompts(folder, manifest, items)])


def test_keep_precision_reaches_the_graph_and_the_manifest(tmp_path: Path, tiny_llava: Path) -> None:
    kept = {"layers.0.mlp.down_proj": "w8a8", "lm_head": "float", "layers.1.self_attn.*": "w4a16", "*.up_proj": "w4a8"}
    manifest = _export(tiny_llava, tmp_path / "bundle", "rotate", keep=0.3, keep_precision=kept)
    assert manifest.recipe["keep_precision"] == kept
    assert manifest.parity["verdict"] == "PASS"
    realized = Manifest.read(tmp_path / "bundle").precision
    assert realized["decoder:/model/layers.0/mlp/down_proj/MatMul"] == "w8a8"
    assert realized["decoder:/lm_head/MatMul"] == "float32"
    attention = [realized[f"decoder:/model/layers.1/attn/{part}_proj/MatMul"] for part in "qkvo"]
    assert attention == ["w4a16"] * 4
    assert _decoder_precision(manifest) == {"float32": 1, "w4a16": 4, "w4a4": 7, "w4a8": 2, "w8a8": 1}


def test_a_pattern_that_matches_nothing_is_a_usage_error(tmp_path: Path, tiny_llava: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"keep_precision 'layers\.7\.\*' matches no linear layer .* names like"
    ) as caught:
        _export(tiny_llava, tmp_path / "bundle", "rotate", keep_precision={"*.mlp.*": "w8a8", "layers.7.*": "float"})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_calibration_data_for_a_recipe_that_reads_none_are_refused(tmp_path: Path, tiny_llava: Path) -> None:
    with pytest.raises(RecipeError, match="recipe rotate reads no calibration data; leave --calibration out"):
        pipeline.export(
            tiny_llava,
            make_recipe("rotate", {}),
            tmp_path / "bundle",
            name="x",
            force=False,
            progress=lambda *_: None,
            calibration_data=tmp_path,
        )
    assert list(tmp_path.iterdir()) == []


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


def test_original_positions_reach_the_decoder(tmp_path: Path, tiny_llava: Path) -> None:
    _export(tiny_llava, tmp_path / "bundle", "none", keep=0.2, positions="original")
    bundle = QavpModel.from_bundle(tmp_path / "bundle")
    prepared = bundle.prepare(_images(1)[0], "<bos> <image> left", chat_template=False)
    kept = prepared.kept_indices[0]
    # <bos> is 0; image tokens keep 1 + their index in the grid of 25; the word follows at 26.
    assert prepared.position_ids[0].tolist() == [0, *(1 + kept).tolist(), 26]


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
