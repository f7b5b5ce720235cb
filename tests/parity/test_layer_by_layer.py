"""The parity check of models that are never loaded whole, forced on a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qavp_export import pipeline
from qavp_export.errors import ParityError
from qavp_export.manifest import Manifest
from qavp_export.parity import check
from qavp_export.parity.truncated import truncated_decoder
from qavp_export.recipe import make_recipe
from qavp_export.weight_file import WeightFile
from tests.models.tiny import TinySpec, make_llava

LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("deep") / "model", TinySpec(layers=LAYERS, decoder="qwen2", tied=True))


def _export(model: Path, target: Path, recipe: str) -> Manifest:
    return pipeline.export(
        model, make_recipe(recipe, {}), target, name=model.name, force=False, progress=lambda *_: None
    )


@pytest.mark.parametrize("recipe", ["rotate", "rtn", "w4a16", "none"])
def test_every_layer_is_compared_without_loading_the_model(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(check, "WHOLE_BYTES", 0)
    loaded: list[Any] = []
    load = check.load_reference

    def record(*args: Any) -> Any:
        loaded.append(load(*args))
        return loaded[-1]

    monkeypatch.setattr(check, "load_reference", record)
    parity = _export(checkpoint, tmp_path / "bundle", recipe).parity
    assert (parity["verdict"], parity["reason"]) == ("PASS", "")
    assert "cut to its first 2 layers, complete" in parity["compared"]
    assert "then all layers of the decoder, one by one" in parity["compared"]
    # Float32 sums in another order, as for a model that is compared whole.
    assert parity["max_abs"] < 1e-4
    assert parity["argmax_agreement"] == 1
    assert [len(model.model.language_model.layers) for model in loaded] == [2]
    assert sorted(path.name for path in (tmp_path / "bundle" / "decoder").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]


def test_a_model_of_one_layer_is_compared_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "WHOLE_BYTES", 0)
    model = make_llava(tmp_path / "model", TinySpec(layers=1))
    assert _export(model, tmp_path / "bundle", "none").parity["verdict"] == "PASS"


# The first in a layer that the copy holds, the other in one that it does not.
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("recipe", ["rotate", "w8a8"])
def test_a_wrong_weight_of_any_layer_is_found(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, layer: int, recipe: str
) -> None:
    monkeypatch.setattr(check, "WHOLE_BYTES", 0)
    write = WeightFile.write

    def damage(self: WeightFile, name: str, tensor: ir.TensorProtocol) -> None:
        if f"layers.{layer}.mlp.up_proj" in name and name.endswith(".codes"):
            # As if it were another layer's: outputs in another order.
            order = np.random.default_rng(0).permutation(tensor.shape.numpy()[1])
            tensor = ir.Tensor(np.ascontiguousarray(tensor.numpy()[:, order]), dtype=tensor.dtype, name=name)
        write(self, name, tensor)

    monkeypatch.setattr(WeightFile, "write", damage)
    module = rf"model\.language_model\.layers\.{layer}\.mlp\.up_proj"
    with pytest.raises(ParityError, match=f"the weight of {module} has cosine|quantized weights differ"):
        _export(checkpoint, tmp_path / "bundle", recipe)


def test_a_truncated_graph_is_a_model_with_fewer_layers(tmp_path: Path, checkpoint: Path) -> None:
    bundle = tmp_path / "bundle"
    manifest = _export(checkpoint, bundle, "none")
    config = AutoConfig.from_pretrained(checkpoint)
    config.text_config.num_hidden_layers = 3
    config.text_config.layer_types = config.text_config.layer_types[:3]
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, config=config, dtype=torch.float32).eval()
    _read_sizes_from_the_last_cache(bundle / "decoder" / "model.onnx")
    spec, rng = manifest.decoder, np.random.default_rng(1)
    embeds = rng.standard_normal((1, 6, spec.hidden_size)).astype(np.float32)
    with torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=torch.from_numpy(embeds)).last_hidden_state
        expected = model.lm_head(hidden).numpy()
    with truncated_decoder(bundle / "decoder" / "model.onnx", 3) as path:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        cache = [value.name for value in session.get_inputs() if value.name.startswith("past")]
        assert len(cache) == 2 * 3
        assert [value.name for value in session.get_outputs()][-1] == "present.2.value"
        empty = np.zeros((1, spec.num_key_value_heads, 0, spec.head_dim), np.float32)
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, 6), np.int64),
            "position_ids": np.arange(6)[None],
        }
        (actual,) = session.run(["logits"], feeds | dict.fromkeys(cache, empty))
    # Float32 sums in another order.
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert sorted(file.name for file in (bundle / "decoder").iterdir()) == ["model.onnx", "model.onnx.data"]


def _read_sizes_from_the_last_cache(path: Path) -> None:
    """As the exporter does for deeper models."""
    model = ir.load(path)
    shapes = [
        node
        for node in model.graph
        if node.op_type == "Shape" and str(node.inputs[0] and node.inputs[0].name).startswith("past_key_values.")
    ]
    assert shapes
    last = next(value for value in model.graph.inputs if value.name == f"past_key_values.{LAYERS - 1}.value")
    for node in shapes:
        node.replace_input_with(0, last)
    ir.save(model, path)
