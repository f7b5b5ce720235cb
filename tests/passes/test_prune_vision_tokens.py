"""PruneVisionTokens on vision graphs that torch exported, against torch's own attentions and the NumPy reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from qavp_export.errors import GraphError, InputError
from qavp_export.numerics.score import ScoreInput, hybrid_token_score
from qavp_export.numerics.select import select_topk, tokens_to_keep
from qavp_export.passes import PruneVisionTokens
from tests.passes.graphs import graph, op_types, session

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

# 7 x 7 patches and a width of 96: odd sizes, no powers of two.
PATCHES, WIDTH, KEEP = 49, 96, 0.125


class _Tower(torch.nn.Module):
    """A random CLIP vision tower and a two-layer projector, as LLaVA arranges them."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=8,
            attn_implementation=attention,
        )
        self.tower = CLIPVisionModel(config)
        self.projector = torch.nn.Sequential(torch.nn.Linear(48, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return self.projector(hidden[-2][:, 1:])


def _make_tower(attention: str) -> _Tower:
    torch.manual_seed(0)
    tower = _Tower(attention).eval()
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            # Initial weights are so small that every attention is uniform and all scores are ties.
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(4)
    return tower


@dataclass(frozen=True)
class _Truth:
    """What torch computes on a batch.

    Attributes:
        pixels: `[2,3,56,56]`.
        features: All projected tokens, `[2,49,96]`.
        attention: The layer that feeds the projector, `[2,4,50,50]`.
    """

    pixels: np.ndarray
    features: np.ndarray
    attention: np.ndarray

    def relevance(self, scorer: str) -> np.ndarray:
        if scorer == "cls":
            return self.attention[:, :, 0, 1:].mean(axis=1)
        return self.attention[:, :, 1:, 1:].mean(axis=(1, 2))


@pytest.fixture(scope="module")
def truth() -> _Truth:
    tower = _make_tower("eager")
    torch.manual_seed(3)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        # hidden_states[-2] is what the layer before the last puts out.
        attention = tower.tower(pixels, output_attentions=True).attentions[-2]
        return _Truth(pixels.numpy(), tower(pixels).numpy(), attention.numpy())


@pytest.fixture(scope="module", params=[("sdpa", 23), ("eager", 23), ("sdpa", 18)], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tower as an ONNX file: one Attention node per layer, or the attention written out."""
    attention, opset = request.param
    tower = _make_tower(attention)
    program = torch.onnx.export(
        tower,
        (torch.zeros(2, 3, 56, 56),),
        dynamo=True,
        opset_version=opset,
        optimize=True,
        input_names=["pixel_values"],
        output_names=["image_features"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    path = tmp_path_factory.mktemp("exported") / "vision.onnx"
    assert program is not None
    program.save(path)
    fused = [node.op_type for node in ir.load(path).graph].count("Attention")
    assert fused == (2 if (attention, opset) == ("sdpa", 23) else 0)
    return path


@pytest.mark.parametrize("score_input", ["raw", "rms"])
@pytest.mark.parametrize("scorer", ["cls", "received"])
def test_pruned_export_equals_torch_and_reference(
    exported: Path, truth: _Truth, scorer: str, score_input: ScoreInput
) -> None:
    model = ir.load(exported)
    result = PruneVisionTokens(keep=KEEP, semantic=scorer, score_input=score_input)(model)  # type: ignore[arg-type]
    assert (result.matched, result.refused) == (1, [])
    # The default group size: 32 is the largest of 128, 64, 32, 16 that divides 96.
    score = hybrid_token_score(truth.features, truth.relevance(scorer), group_size=32, score_input=score_input)
    kept = tokens_to_keep(PATCHES, KEEP)
    ranked = np.sort(score, axis=-1)[:, ::-1]
    # torch and ONNX Runtime round matrix products differently. Scores agree to 1e-5, so the comparison of kept
    # indices is exact as long as the data has no tie closer than that at the cut: checked, not assumed.
    assert (ranked[:, kept - 1] - ranked[:, kept]).min() > 1e-4
    indices = select_topk(score, kept)
    for optimize in (False, True):
        features, chosen = session(model, optimize=optimize).run(None, {"pixel_values": truth.pixels})
        np.testing.assert_array_equal(chosen, indices)
        expected = truth.features[np.arange(2)[:, np.newaxis], indices]
        np.testing.assert_allclose(features, expected, atol=2e-5)


def test_outputs_keep_the_exporter_s_names(exported: Path, tmp_path: Path) -> None:
    model = ir.load(exported)
    PruneVisionTokens(tokens=5)(model)
    ir.save(model, tmp_path / "pruned.onnx")
    loaded = ort.InferenceSession(tmp_path / "pruned.onnx", providers=["CPUExecutionProvider"])
    outputs = {output.name: output.shape[1:] for output in loaded.get_outputs()}
    assert outputs == {"image_features": [5, WIDTH], "kept_indices": [5]}
    assert all(isinstance(output.shape[0], str) for output in loaded.get_outputs())


def test_weights_without_data_are_enough(exported: Path) -> None:
    model = ir.load(exported)
    weights = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    for weight in weights:
        weight.shape, weight.const_value = weight.shape, None
    assert PruneVisionTokens(keep=KEEP)(model).matched == 1
    assert all(weight.const_value is None for weight in weights)


def _attention_free() -> ir.Model:
    return graph("(float[B,12,32] x) => (float[B,12,32] image_features)", "image_features = Neg (x)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.5}, "no attention upstream"),
        ({"tokens": 13, "semantic": "norm"}, "tokens is 13, but 'image_features' has 12"),
        ({"keep": 0.5, "semantic": "norm", "group_size": 24}, "does not divide the feature width 32"),
        ({"keep": 0.5, "at": "features"}, "no value named 'features'"),
    ],
)
def test_a_refused_graph_is_left_as_it_was(settings: dict[str, object], message: str) -> None:
    model = _attention_free()
    with pytest.raises(InputError, match=message):
        PruneVisionTokens(**settings)(model)  # type: ignore[arg-type]
    assert op_types(model) == ["Neg"]
    assert [output.name for output in model.graph.outputs] == ["image_features"]
    assert not model.functions


def test_pruning_twice_is_refused() -> None:
    model = _attention_free()
    PruneVisionTokens(keep=0.5, semantic="norm")(model)
    with pytest.raises(GraphError, match="was it pruned before"):
        PruneVisionTokens(keep=0.5, semantic="norm")(model)


def test_composes_with_onnx_ir_passes() -> None:
    model = _attention_free()
    sequence = ir.passes.Sequential(
        PruneVisionTokens(keep=0.25, semantic="random"), ir.passes.common.TopologicalSortPass()
    )
    assert sequence(model).modified
    assert str(model.graph.outputs[0].shape) == "[B,3,32]"
