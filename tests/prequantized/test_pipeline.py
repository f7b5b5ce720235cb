"""Quantized checkpoints end to end: the bundle is that of the float checkpoint which the quantized one stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForImageTextToText

from qavp_export import pipeline
from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import CheckpointError
from qavp_export.manifest import Manifest
from qavp_export.parity.loading import load_reference
from qavp_export.recipe import make_recipe
from qavp_export.source import read_plan
from qavp_export.tracing import build_skeleton
from qavp_export.weights import CheckpointWeights
from tests.models.tiny import TinySpec, make_llava
from tests.prequantized.checkpoints import TOOLS, Tool, gptq_settings, set_quantization, write_quantized

STYLES = {
    "llava-hf/llava-1.5-7b-hf": {"vision_tower.": "vision_tower.vision_model."},
    "transformers 4.5x": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


def _export(model: Path, target: Path, recipe: str) -> Manifest:
    fields = {"keep": 0.3}
    return pipeline.export(
        model, make_recipe(recipe, fields), target, name="tiny", force=False, progress=lambda *_: None
    )


def _graphs(manifest: Manifest) -> dict[str, str]:
    """Digests of graphs and weights; the copied config.json differs by its quantization_config."""
    return {entry.path: entry.sha256 for entry in manifest.files if entry.path != "config.json"}


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _assert_equal(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = _state(actual), _state(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor), name


def _rename(folder: Path, style: str) -> None:
    path = folder / "model.safetensors"
    renamed = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        old, new = next((pair for pair in STYLES[style].items() if name.startswith(pair[0])), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    safetensors.torch.save_file(renamed, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Callable[[Tool, str], Manifest]:
    """Exports the float checkpoint of a tool, once for all tools that round to the same values."""

    @cache
    def export(bits: int, group_size: int, symmetric: bool, recipe: str) -> Manifest:
        folder = tmp_path_factory.mktemp("floats")
        tool = next(t for t in TOOLS.values() if (t.bits, t.group_size, t.symmetric) == (bits, group_size, symmetric))
        write_quantized(tiny_llava, tool, folder / "quantized", folder / "floats")
        # transformers itself reads this one for the parity check: that is the truth.
        manifest = _export(folder / "floats", folder / "bundle", recipe)
        assert manifest.parity["verdict"] == "PASS"
        return manifest

    return lambda tool, recipe: export(tool.bits, tool.group_size, tool.symmetric, recipe)


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "none") for name in TOOLS), ("gptq", "rtn"), ("compressed-tensors W4A16", "rtn")]
)
def test_exports_what_the_float_checkpoint_exports(
    tmp_path: Path, tiny_llava: Path, name: str, recipe: str, expected: Callable[[Tool, str], Manifest]
) -> None:
    write_quantized(tiny_llava, TOOLS[name], tmp_path / "quantized", tmp_path / "floats")
    manifest, of_floats = _export(tmp_path / "quantized", tmp_path / "bundle", recipe), expected(TOOLS[name], recipe)
    assert manifest.parity["verdict"] == "PASS"
    assert _graphs(manifest) == _graphs(of_floats)
    assert manifest.precision == of_floats.precision


@pytest.mark.parametrize("tool", TOOLS)
def test_the_reference_has_the_dequantized_weights(tmp_path: Path, tiny_llava: Path, tool: str) -> None:
    quantized, floats = tmp_path / "quantized", tmp_path / "floats"
    write_quantized(tiny_llava, TOOLS[tool], quantized, floats)
    _assert_equal(load_reference(quantized, ()), load_reference(floats, ()))


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.startswith("compressed-tensors")])
def test_the_reference_is_what_transformers_dequantizes(tmp_path: Path, tiny_llava: Path, tool: str) -> None:
    quantized = tmp_path / "quantized"
    write_quantized(tiny_llava, TOOLS[tool], quantized, tmp_path / "floats")
    set_quantization(quantized, TOOLS[tool].settings | {"dequantize": True})
    auto: Any = AutoModelForImageTextToText
    library = auto.from_pretrained(quantized, dtype=torch.float32)
    ours, theirs = _state(load_reference(quantized, ())), _state(library)
    for name, tensor in ours.items():
        # The library multiplies in the scale's float16: half a unit in its last place, 2^-11.
        torch.testing.assert_close(theirs[name], tensor, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("inside", [None, "text_config"])
def test_every_name_style_and_place_of_the_settings(
    tmp_path: Path, tiny_llava: Path, style: str, inside: str | None
) -> None:
    quantized, floats = tmp_path / "quantized", tmp_path / "floats"
    write_quantized(tiny_llava, TOOLS["gptq"], quantized, floats)
    shutil.copy(tiny_llava / "config.json", quantized)
    set_quantization(quantized, TOOLS["gptq"].settings, inside)
    _rename(quantized, style)
    _assert_equal(load_reference(quantized, ()), load_reference(floats, ()))


def test_tied_embeddings_and_biases(tmp_path: Path) -> None:
    source = make_llava(tmp_path / "model", TinySpec(decoder="qwen2", heads=4, kv_heads=4, tied=True))
    quantized, floats = tmp_path / "quantized", tmp_path / "floats"
    write_quantized(source, TOOLS["awq"], quantized, floats)
    reference: Any = load_reference(quantized, ())
    assert reference.lm_head.weight is reference.model.language_model.embed_tokens.weight
    _assert_equal(reference, load_reference(floats, ()))


def _weights(folder: Path) -> CheckpointWeights:
    checkpoint = Checkpoint.open(folder)
    config, family, _ = read_plan(folder, checkpoint.config)
    return CheckpointWeights(checkpoint, family, build_skeleton(config)[0])


def test_a_configuration_without_quantized_weights_is_no_quantization(tmp_path: Path, tiny_llava: Path) -> None:
    shutil.copytree(tiny_llava, tmp_path / "model")
    set_quantization(tmp_path / "model", TOOLS["gptq"].settings)
    assert _weights(tmp_path / "model").prequantized is None
    _assert_equal(load_reference(tmp_path / "model", ()), load_reference(tiny_llava, ()))


def test_what_is_quantized_is_told_from_what_is_not(tmp_path: Path, tiny_llava: Path) -> None:
    quantized = tmp_path / "quantized"
    write_quantized(tiny_llava, TOOLS["compressed-tensors W8A8"], quantized, tmp_path / "floats")
    weights = _weights(quantized)
    assert weights.prequantized is not None
    assert json.loads(json.dumps(weights.prequantized.describe())) == {
        "method": "compressed-tensors",
        "bits": 8,
        "group_size": -1,
        "symmetric": True,
        "activations": None,
    }
    layer = "model.language_model.layers.1.mlp.down_proj.weight"
    assert weights.is_prequantized(layer)
    assert weights.stored_dtype(layer) == ir.DataType.FLOAT
    assert weights.stored_dtype("lm_head.weight") == ir.DataType.FLOAT16
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"):
        assert weights.holds(name)
        assert not weights.is_prequantized(name)
    assert not weights.holds("model.language_model.layers.2.mlp.down_proj.weight")


def _message(folder: Path, target: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _export(folder, target, "none")
    assert "\n" not in str(caught.value)
    assert not target.exists()
    return str(caught.value)


def test_a_weight_both_ways(tmp_path: Path, tiny_llava: Path) -> None:
    quantized = tmp_path / "quantized"
    write_quantized(tiny_llava, TOOLS["gptq"], quantized, tmp_path / "floats")
    path, prefix = quantized / "model.safetensors", "language_model.model.layers.0.mlp.up_proj."
    tensors = safetensors.torch.load_file(path)
    tensors[f"{prefix}weight"] = torch.zeros(160, 96)
    safetensors.torch.save_file(tensors, path)
    assert f"{prefix}weight and {prefix}" in _message(quantized, tmp_path / "bundle")


def test_a_part_is_missing(tmp_path: Path, tiny_llava: Path) -> None:
    quantized = tmp_path / "quantized"
    write_quantized(tiny_llava, TOOLS["gptq"], quantized, tmp_path / "floats")
    path, name = quantized / "model.safetensors", "language_model.model.layers.0.mlp.up_proj.scales"
    tensors = safetensors.torch.load_file(path)
    del tensors[name]
    safetensors.torch.save_file(tensors, path)
    assert f"1 tensor missing ({name})" in _message(quantized, tmp_path / "bundle")


def test_no_settings(tmp_path: Path, tiny_llava: Path) -> None:
    # Old AutoGPTQ kept them in quantize_config.json.
    quantized = tmp_path / "quantized"
    write_quantized(tiny_llava, TOOLS["gptq"], quantized, tmp_path / "floats")
    shutil.copy(tiny_llava / "config.json", quantized)
    with pytest.raises(CheckpointError, match=r"1 tensor missing .* needs the quantization_config that its quantizer"):
        _weights(quantized).check({"model.language_model.layers.0.mlp.up_proj.weight": (160, 96)})


@pytest.mark.parametrize("settings", [{"quant_method": "bitsandbytes"}, gptq_settings(bits=3)])
def test_unsupported_settings_end_the_export_and_the_reference(
    tmp_path: Path, tiny_llava: Path, settings: dict[str, Any]
) -> None:
    shutil.copytree(tiny_llava, tmp_path / "model")
    set_quantization(tmp_path / "model", settings)
    message = _message(tmp_path / "model", tmp_path / "bundle")
    assert message.startswith("quantization_config in config.json has ")
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json has"):
        load_reference(tmp_path / "model", ())
