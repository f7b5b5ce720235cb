"""Pixtral and Mistral 3: one graph for images of every size, against transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from qavp_export import EngineOptions, QavpModel, pipeline
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import CheckpointError, GraphError
from qavp_export.families import FAMILIES, Family, family_of
from qavp_export.manifest import Manifest
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import norm_relevance, random_relevance
from qavp_export.passes import KeepAllTokens, PruneVisionTokens
from qavp_export.recipe import make_recipe
from qavp_export.runtime.processors import load_processor
from qavp_export.tracing import PARAMETER
from tests.engines.rtx import RTX, check_engines
from tests.families.harness import traced_vision
from tests.models.mistral3 import MERGE, PATCH, make_mistral3, make_pixtral
from tests.passes.graphs import run

# Height and width: multiples of a token's 8 pixels, each longer in turn, and none of those that are traced with.
SIZES = [(16, 56), (56, 32), (40, 40), (8, 24), (56, 8)]
MAKERS: dict[str, Callable[[Path], Path]] = {"pixtral": make_pixtral, "mistral3": make_mistral3}
STEPS = 8
PROMPT = "w20 [IMG] what is the color ?"
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Model:
    """A tiny model and its vision graph with weights."""

    folder: Path
    torch: Any
    graph: ir.Model
    family: Family

    @property
    def merge(self) -> int:
        """Patches along a side of a token."""
        return MERGE if self.family.model_type == "mistral3" else 1

    def features(self, pixels: Floats) -> npt.NDArray[np.float32]:
        """Image features by transformers `[N,D]`."""
        sizes = torch.tensor([pixels.shape[2:]])
        with torch.no_grad():
            found = self.torch.get_image_features(torch.from_numpy(pixels), image_sizes=sizes).pooler_output[0]
        result: npt.NDArray[np.float32] = found.numpy()
        return result

    def received(self, pixels: Floats) -> npt.NDArray[np.float32]:
        """What tokens receive of the tower's last attention, by transformers `[1,N]`."""
        with torch.no_grad():
            attention = self.torch.model.vision_tower(torch.from_numpy(pixels), output_attentions=True).attentions[-1]
        rows, columns = (size // PATCH // self.merge for size in pixels.shape[2:])
        squares = attention.mean(dim=(0, 1, 2)).reshape(rows, self.merge, columns, self.merge)
        result: npt.NDArray[np.float32] = squares.mean(dim=(1, 3)).reshape(1, -1).numpy()
        return result

    def bundle(
        self, folder: Path, recipe: str = "none", targets: EngineTargets | None = None, **overrides: Any
    ) -> Manifest:
        made, quiet = make_recipe(recipe, overrides), lambda *_: None
        return pipeline.export(self.folder, made, folder, name="tiny", force=False, progress=quiet, targets=targets)

    def answer(self, **inputs: torch.Tensor) -> list[int]:
        """The greedy answer by transformers; the runtime never generates a placeholder."""
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        never = [self.torch.config.image_token_id]
        output = self.torch.generate(**inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=never)
        tokens: list[int] = output[0, prompt:].tolist()
        return tokens


def _pixels(size: tuple[int, int]) -> Floats:
    return np.random.default_rng(sum(size)).standard_normal((1, 3, *size)).astype(np.float32)


def _image(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=list(MAKERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Model:
    folder = MAKERS[request.param](tmp_path_factory.mktemp("native") / request.param)
    family = FAMILIES[request.param]
    reference, graph = traced_vision(folder, family)
    return _Model(folder, reference, graph, family)


def test_unpruned_features_are_those_of_transformers(model: _Model) -> None:
    graph = model.graph.clone()
    KeepAllTokens()(graph)
    assert [str(value.shape) for value in graph.graph.inputs] == ["[1,3,height,width]"]
    assert [value.name for value in graph.graph.outputs] == ["image_features", "kept_indices"]
    for size in SIZES:
        pixels = _pixels(size)
        features, kept = run(graph, {"pixel_values": pixels})
        expected = model.features(pixels)
        # Features are up to 20; float32 sums of some hundred terms in another order.
        np.testing.assert_allclose(features[0], expected, atol=1e-4)
        np.testing.assert_array_equal(kept, [np.arange(len(expected))])


@pytest.mark.parametrize("scorer", ["cls", "received", "norm", "random"])
def test_pruned_graph_keeps_what_the_reference_keeps(model: _Model, scorer: str) -> None:
    graph = model.graph.clone()
    if scorer == "cls":
        with pytest.raises(GraphError, match=r"a \[CLS\] among them cannot be told; use semantic 'received'"):
            PruneVisionTokens(keep_input=True, semantic="cls")(graph)
        return
    PruneVisionTokens(keep_input=True, semantic=scorer, group_size=32)(graph)  # type: ignore[arg-type]
    assert [value.name for value in graph.graph.inputs] == ["pixel_values", "keep_tokens"]
    assert [str(value.shape) for value in graph.graph.outputs] == ["[1,kept,96]", "[1,kept]"]
    for size, kept in [(SIZES[0], 5), (SIZES[1], 1), (SIZES[2], 12), (SIZES[3], 2)]:
        pixels = _pixels(size)
        tokens = model.features(pixels)[np.newaxis]
        relevance = {"norm": norm_relevance(tokens), "random": random_relevance(0, tokens.shape[1])[np.newaxis]}
        score = hybrid_token_score(tokens, relevance.get(scorer, model.received(pixels)), group_size=32)
        ranked = np.sort(score, axis=-1)[:, ::-1]
        # Scores agree to 1e-5, and no tie at the cut is closer than that: checked, not assumed.
        assert (ranked[:, kept - 1] - ranked[:, kept]).min() > 5e-5
        features, indices = run(graph, {"pixel_values": pixels, "keep_tokens": np.array([kept])})
        np.testing.assert_array_equal(indices, select_topk(score, kept))
        np.testing.assert_allclose(features[0], tokens[0, indices[0]], atol=1e-4)


def test_unpruned_bundle_answers_as_transformers_does(model: _Model, tmp_path: Path) -> None:
    assert model.bundle(tmp_path / "bundle", keep=1.0).parity["verdict"] == "PASS"
    bundle, processor = (
        QavpModel.from_bundle(tmp_path / "bundle", options=EngineOptions(threads=1)),
        load_processor(model.folder),
    )
    for size in [(24, 40), (33, 56), (70, 20), (120, 90)]:
        inputs = processor(text=PROMPT, images=_image(size), return_tensors="pt")
        found = bundle.generate_ids(_image(size), PROMPT, chat_template=False, max_new_tokens=STEPS)
        assert found == [model.answer(**inputs)]


def test_one_pruned_bundle_answers_as_transformers_fed_the_same_tokens(model: _Model, tmp_path: Path) -> None:
    assert model.bundle(tmp_path / "bundle", keep_range=(0.02, 0.6)).parity["verdict"] == "PASS"
    bundle, processor = (
        QavpModel.from_bundle(tmp_path / "bundle", options=EngineOptions(threads=1)),
        load_processor(model.folder),
    )
    words, breaks = processor.tokenizer.convert_tokens_to_ids, []
    for size, keep in [((24, 40), 0.5), ((56, 33), 0.05), ((33, 70), None)]:
        inputs = processor(text=PROMPT, images=_image(size), return_tensors="pt")
        pixels = inputs["pixel_values"].numpy()
        rows, columns = (side // PATCH // model.merge for side in pixels.shape[2:])
        count = max(1, int((0.125 if keep is None else keep) * rows * columns + 0.5))
        _, indices = bundle.engine.encode_images({"pixel_values": pixels, "keep_tokens": np.array([count])})
        kept = [[i for i in range(row * columns, (row + 1) * columns) if i in indices[0]] for row in range(rows)]
        # Row by row what is kept, a break behind a row that has something, the end behind the last.
        ids = [words("w20")]
        for row in kept[:-1]:
            ids += [words("[IMG]")] * len(row) + [words("[IMG_BREAK]")] * bool(row)
        ids += [words("[IMG]")] * len(kept[-1]) + [words("[IMG_END]")] + [words(word) for word in PROMPT.split()[2:]]
        embeds = model.torch.get_input_embeddings()(torch.tensor([ids])).detach()
        embeds[torch.tensor([ids]) == words("[IMG]")] = torch.from_numpy(model.features(pixels)[indices[0]])
        found = bundle.generate_ids(_image(size), PROMPT, chat_template=False, max_new_tokens=STEPS, keep=keep)
        assert found == [model.answer(inputs_embeds=embeds)]
        breaks.append(rows - 1 - sum(map(bool, kept[:-1])))
    assert max(breaks) > 0


def test_w4a4_matches_torch(model: _Model, tmp_path: Path) -> None:
    # The default recipe, and for the family whose decoder is the same one that needs less time.
    manifest = model.bundle(tmp_path / "bundle", "auto" if model.merge > 1 else "rtn", RTX)
    check_engines(manifest, tmp_path / "bundle")
    assert manifest.parity["verdict"] == "PASS"
    assert manifest.parity["kept_indices_equal"] == 1.0
    tokens = manifest.vision_tokens
    assert (manifest.family, tokens.layout, tokens.unit) == (model.family.model_type, "native", "image")
    assert (tokens.before, tokens.after) == (None, None)
    row_break = load_processor(model.folder).tokenizer.convert_tokens_to_ids("[IMG_BREAK]")
    expected = {"patch_size": PATCH, "spatial_merge_size": model.merge, "row_break_token_id": row_break}
    assert tokens.layout_settings == expected


def test_no_parameter_is_lost_under_another_name(model: _Model) -> None:
    graph = model.graph.graph
    named = {value.metadata_props.get(PARAMETER) for value in graph.initializers.values()}
    vision = {name for name, _ in model.torch.named_parameters() if "vision_tower" in name or "projector" in name}
    assert named - {None} == vision


# mistral-community/pixtral-12b and mistralai/Mistral-Small-3.1-24B-Instruct-2503, and what transformers 5 writes.
PUBLISHED = {
    "language_model.model.layers.1.mlp.up_proj.weight": "model.language_model.layers.1.mlp.up_proj.weight",
    "model.language_model.layers.1.mlp.up_proj.weight": "model.language_model.layers.1.mlp.up_proj.weight",
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "vision_tower.patch_conv.weight": "model.vision_tower.patch_conv.weight",
    "vision_tower.ln_pre.weight": "model.vision_tower.ln_pre.weight",
    "vision_tower.transformer.layers.0.attention.q_proj.weight": (
        "model.vision_tower.transformer.layers.0.attention.q_proj.weight"
    ),
    "multi_modal_projector.linear_2.weight": "model.multi_modal_projector.linear_2.weight",
}
MERGED = {
    "multi_modal_projector.norm.weight": "model.multi_modal_projector.norm.weight",
    "multi_modal_projector.patch_merger.merging_layer.weight": (
        "model.multi_modal_projector.patch_merger.merging_layer.weight"
    ),
}


def test_every_published_spelling_of_a_name_is_understood(model: _Model) -> None:
    parameters = {name for name, _ in model.torch.named_parameters()}
    for stored, parameter in (PUBLISHED | (MERGED if model.merge > 1 else {})).items():
        assert model.family.parameter_names([stored]) == {parameter: stored}
        assert parameter in parameters


def test_the_tower_tells_pixtral_from_llava(model: _Model, tiny_llava: Path) -> None:
    config = json.loads((model.folder / "config.json").read_text())
    assert family_of(config) is model.family
    assert family_of(json.loads((tiny_llava / "config.json").read_text())) is FAMILIES["llava"]
    assert family_of({"model_type": "llava", "vision_config": None}) is FAMILIES["llava"]


def test_configurations_that_cannot_be_served_are_refused(model: _Model) -> None:
    config = copy.deepcopy(model.torch.config)
    if model.merge > 1:
        config.vision_feature_layer = [-2, -1]
        expected = r"vision_feature_layer \[-2, -1\], and the projector of Mistral 3 reads one"
    else:
        config.vision_feature_select_strategy = "default"
        expected = "'default' in config.json would drop an image's first patch"
    with pytest.raises(CheckpointError, match=expected):
        model.family.plan(config)
