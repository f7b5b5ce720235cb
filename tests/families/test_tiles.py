"""LLaVA-NeXT and LLaVA-OneVision: graphs of packed tiles, against transformers on images of several shapes."""

from __future__ import annotations

import copy
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
from transformers import CLIPVisionConfig

from qavp_export import EngineOptions, QavpModel, pipeline
from qavp_export.errors import CheckpointError, GraphError
from qavp_export.families import FAMILIES
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import norm_relevance, random_relevance
from qavp_export.passes import KeepAllTokens, PruneVisionTokens
from qavp_export.recipe import make_recipe
from qavp_export.runtime.processors import load_processor
from qavp_export.runtime.tiles import count_tiles, pack_tiles
from qavp_export.tracing import PARAMETER
from tests.engines.rtx import RTX, check_engines
from tests.families.harness import traced_vision
from tests.models.llava_next import PATCH, SIDE, make_llava_next, make_llava_onevision
from tests.passes.graphs import run

# Height and width: grids of 1x2, 2x1, 2x2, 1x3 and 3x1 tiles, padded at every side but for the exact fits.
SIZES = [(50, 90), (90, 50), (80, 80), (41, 200), (200, 41), (33, 61), (77, 64)]
MAKERS: dict[str, Callable[[Path], Path]] = {"llava_next": make_llava_next, "llava_onevision": make_llava_onevision}
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Model:
    """A tiny model, its vision graph with weights, and what the runtime knows of its tiles."""

    folder: Path
    torch: Any
    graph: ir.Model
    settings: dict[str, Any]

    def pixels(self, size: tuple[int, int]) -> Floats:
        tiles = count_tiles(size, self.settings)
        return np.random.default_rng(sum(size)).standard_normal((tiles, 3, SIDE, SIDE)).astype(np.float32)

    def pack(self, per_patch: torch.Tensor, size: tuple[int, int]) -> npt.NDArray[Any]:
        """Packs `[T,N,C]` as transformers does, without newlines: `[1,M,C]`."""
        last = ["default"] if self.torch.config.model_type == "llava_next" else []
        aspect = {} if last else {"vision_aspect_ratio": self.torch.config.vision_aspect_ratio}
        packed, _ = self.torch.model.pack_image_features([per_patch], [size], *last, image_newline=None, **aspect)
        result: npt.NDArray[Any] = packed[0][None].numpy()
        return result

    def tower(self, pixels: Floats) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected tokens `[T,N,D]`, and the attention of the layer that feeds the projector."""
        config = self.torch.config
        with torch.no_grad():
            output = self.torch.model.vision_tower(
                torch.from_numpy(pixels), output_hidden_states=True, output_attentions=True
            )
            states = output.hidden_states[config.vision_feature_layer]
            states = states[:, 1:] if config.vision_feature_select_strategy == "default" else states
            return self.torch.model.multi_modal_projector(states), output.attentions[config.vision_feature_layer]


@pytest.fixture(scope="module", params=list(MAKERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Model:
    folder = MAKERS[request.param](tmp_path_factory.mktemp("tiles") / request.param)
    family = FAMILIES[request.param]
    reference, graph = traced_vision(folder, family)
    return _Model(folder, reference, graph, family.layout_settings(reference.config))


def test_unpruned_features_are_those_of_transformers(model: _Model) -> None:
    graph = model.graph.clone()
    KeepAllTokens()(graph)
    assert "patch_relevance" not in [value.name for value in graph.graph.inputs]
    assert [value.name for value in graph.graph.outputs] == ["image_features", "kept_indices"]
    for size in SIZES:
        pixels = model.pixels(size)
        with torch.no_grad():
            expected = model.torch.get_image_features(torch.from_numpy(pixels), torch.tensor([size])).pooler_output[0]
        feeds = {"pixel_values": pixels, **pack_tiles(size, model.settings, newlines=True)}
        features, kept = run(graph, feeds)
        # Features are up to 10; float32 sums of some hundred terms in another order.
        np.testing.assert_allclose(features[0], expected.numpy(), atol=5e-5)
        np.testing.assert_array_equal(kept, [np.arange(len(expected))])


@pytest.mark.parametrize("scorer", ["cls", "received", "norm", "random"])
def test_pruned_graph_keeps_what_the_reference_keeps(model: _Model, scorer: str) -> None:
    if scorer not in FAMILIES[model.torch.config.model_type].scorers:
        with pytest.raises(GraphError, match=r"has no \[CLS\] token"):
            PruneVisionTokens(keep_input=True, semantic="cls")(model.graph.clone())
        return
    graph = model.graph.clone()
    PruneVisionTokens(keep_input=True, semantic=scorer, group_size=32)(graph)  # type: ignore[arg-type]
    names = [value.name for value in graph.graph.inputs]
    assert names[-1] == "keep_tokens"
    assert "patch_relevance" not in names
    assert [str(value.shape) for value in graph.graph.outputs] == ["[1,kept,96]", "[1,kept]"]
    prefix = int(model.torch.config.vision_feature_select_strategy == "default")
    for size, kept in [(SIZES[0], 7), (SIZES[0], 31), (SIZES[2], 7), (SIZES[3], 1)]:
        pixels = model.pixels(size)
        projected, attention = model.tower(pixels)
        tokens = model.pack(projected, size)
        queries = attention[:, :, :1] if scorer == "cls" else attention[:, :, prefix:]
        relevance = {
            "norm": norm_relevance(tokens),
            "random": random_relevance(0, tokens.shape[1])[None],
        }.get(scorer, model.pack(queries[..., prefix:].mean(dim=(1, 2))[..., None], size)[..., 0])
        score = hybrid_token_score(tokens, relevance, group_size=32)
        ranked = np.sort(score, axis=-1)[:, ::-1]
        # Scores agree to 1e-5, and no tie at the cut is closer than that: checked, not assumed.
        assert (ranked[:, kept - 1] - ranked[:, kept]).min() > 5e-5
        inputs = pack_tiles(size, model.settings, newlines=False)
        feeds = {"pixel_values": pixels, **inputs, "keep_tokens": np.array([kept])}
        features, indices = run(graph, feeds)
        np.testing.assert_array_equal(indices, select_topk(score, kept))
        np.testing.assert_allclose(features[0], tokens[0, indices[0]], atol=5e-5)


PROMPT = "w20 <image> what is the color ?"


def _image(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8))


def _bundle(model: _Model, folder: Path, **overrides: Any) -> QavpModel:
    # Once for a family.
    targets = RTX if "keep_range" in overrides else None
    recipe, quiet = make_recipe("none", overrides), lambda *_: None
    manifest = pipeline.export(model.folder, recipe, folder, name="tiny", force=False, progress=quiet, targets=targets)
    if targets is not None:
        check_engines(manifest, folder)
    assert manifest.parity["verdict"] == "PASS"
    return QavpModel.from_bundle(folder, options=EngineOptions(threads=1))


def test_unpruned_bundle_answers_as_transformers_does(model: _Model, tmp_path: Path) -> None:
    bundle, processor = _bundle(model, tmp_path / "bundle", keep=1.0), load_processor(model.folder)
    for size in SIZES[:5]:
        inputs = processor(text=PROMPT, images=_image(size), return_tensors="pt")
        answer = model.torch.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found = bundle.generate_ids(_image(size), PROMPT, chat_template=False, max_new_tokens=8)
        assert found == [answer.tolist()]


def test_one_pruned_bundle_answers_as_transformers_fed_the_same_tokens(model: _Model, tmp_path: Path) -> None:
    bundle, processor = _bundle(model, tmp_path / "bundle", keep_range=(0.05, 0.6)), load_processor(model.folder)
    embed, newline = model.torch.get_input_embeddings(), model.torch.model.image_newline
    for size, keep in [(SIZES[0], 0.5), (SIZES[0], 0.05), (SIZES[2], 0.5), (SIZES[3], None)]:
        inputs = processor(text=PROMPT, images=_image(size), return_tensors="pt")
        with torch.no_grad():
            tokens = model.torch.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
            embeds = embed(inputs["input_ids"])[0]
        is_image = inputs["input_ids"][0] == model.torch.config.image_token_id
        embeds[is_image] = tokens
        # Newlines are the learned vector to the bit, and no candidates.
        candidates = is_image.nonzero()[:, 0][~(tokens == newline).all(dim=1)]
        feeds = {"pixel_values": inputs["pixel_values"][0].numpy()} | pack_tiles(size, model.settings, newlines=False)
        kept = max(1, int((0.125 if keep is None else keep) * len(candidates) + 0.5))
        _, indices = bundle.engine.encode_images({**feeds, "keep_tokens": np.array([kept])})
        stays = ~is_image
        stays[candidates[indices[0]]] = True
        answer = model.torch.generate(inputs_embeds=embeds[stays][None], max_new_tokens=8, do_sample=False)
        found = bundle.generate_ids(_image(size), PROMPT, chat_template=False, max_new_tokens=8, keep=keep)
        assert found == [answer[0].tolist()]


def test_no_parameter_is_lost_under_another_name(model: _Model) -> None:
    graph = model.graph.graph
    named = {
        value.metadata_props[PARAMETER] for value in graph.initializers.values() if PARAMETER in value.metadata_props
    }
    assert "model.image_newline" in named
    assert all(value.name in named for value in graph.initializers.values() if str(value.name).startswith("model."))
    assert any(str(node.name).startswith("/model/vision_tower/") for node in graph)


@pytest.mark.parametrize(
    ("stored", "parameter"),
    [
        # llava-hf/llava-v1.6-* and llava-hf/llava-onevision-*, and what transformers 5 writes.
        ("image_newline", "model.image_newline"),
        ("model.image_newline", "model.image_newline"),
        ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        (
            "vision_tower.vision_model.embeddings.patch_embedding.weight",
            "model.vision_tower.embeddings.patch_embedding.weight",
        ),
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", "model.vision_tower.encoder.layers.0.mlp.fc1.bias"),
        ("multi_modal_projector.linear_2.weight", "model.multi_modal_projector.linear_2.weight"),
    ],
)
@pytest.mark.parametrize("model_type", list(MAKERS))
def test_every_spelling_of_a_name_is_understood(model_type: str, stored: str, parameter: str) -> None:
    assert FAMILIES[model_type].parameter_names([stored]) == {parameter: stored}


def test_configurations_that_make_no_grid_are_refused(model: _Model) -> None:
    config = copy.deepcopy(model.torch.config)
    family = FAMILIES[config.model_type]
    assert family.plan(config).tower_patches == (SIDE // PATCH) ** 2
    if isinstance(config.vision_config, CLIPVisionConfig):
        config.vision_feature_select_strategy = "full"
        with pytest.raises(CheckpointError, match="26 tokens per tile, which are no grid of 5 x 5"):
            family.plan(config)
    else:
        config.vision_aspect_ratio = "pad"
        with pytest.raises(CheckpointError, match="vision_aspect_ratio 'pad' is not supported"):
            family.layout_settings(config)
