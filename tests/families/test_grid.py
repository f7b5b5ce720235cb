"""Every family of layout `grid` on a tiny random model: the graphs in ONNX Runtime against transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from qavp_export import QavpModel, pipeline
from qavp_export.families.idefics3 import full_tile_positions
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.recipe import DEFAULT_PRESET, make_recipe
from tests.engines.cached_decoders import check_lowered
from tests.engines.rtx import RTX, check_engines
from tests.families.harness import ROUNDING, Array, Batch, Case, transformers_answer, transformers_answer_to
from tests.models.gemma3 import make_gemma3
from tests.models.idefics3 import make_idefics3, make_smolvlm
from tests.models.internvl import make_internvl
from tests.models.paligemma import make_paligemma, make_paligemma2
from tests.models.vipllava import make_vipllava

STEPS = 10


@dataclass(frozen=True)
class Entry:
    """A family's entry: a new family needs one of these and a builder.

    Attributes:
        make: Writes a tiny checkpoint.
        image: What stands for an image in a prompt.
        merge: Patches along one side of a token.
        scorers: Scorers whose relevance is checked.
    """

    make: Callable[[Path], Path]
    image: str = "<image>"
    merge: int = 1
    scorers: tuple[str, ...] = ("received",)


ENTRIES = {
    "vipllava": Entry(make_vipllava, scorers=("cls", "received")),
    "internvl": Entry(make_internvl, "<IMG_CONTEXT>", merge=2, scorers=("cls", "received")),
    "idefics3": Entry(make_idefics3, merge=3),
    "smolvlm": Entry(make_smolvlm, merge=3),
    "gemma3": Entry(make_gemma3, "<start_of_image>", merge=3),
    "paligemma": Entry(make_paligemma),
    "paligemma2": Entry(make_paligemma2),
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a family's checkpoint."""
    return cache(lambda name: ENTRIES[name].make(tmp_path_factory.mktemp("family") / name))


@pytest.fixture(scope="module")
def case_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Case]:
    """Returns a family's case; each is traced once."""
    return cache(lambda name: Case.of(checkpoint_of(name)))


@pytest.fixture(params=ENTRIES)
def name(request: pytest.FixtureRequest) -> str:
    """The name of an entry."""
    found: str = request.param
    return found


def _image(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _prompts(name: str) -> tuple[list[str], list[list[Image.Image]]]:
    """Two images in the first prompt, of which one is wide enough for several tiles; one in the second."""
    image = ENTRIES[name].image
    texts = [f"{image} what is the color {image} left or right ?", f"{image} circle ?"]
    return texts, [[_image(1, 70, 40), _image(2, 33, 36)], [_image(3, 36, 36)]]


def _batch(case: Case, name: str) -> Batch:
    return Batch.of(case.processor, *_prompts(name))


def test_unpruned_equals_transformers(case_of: Callable[[str], Case], name: str) -> None:
    case = case_of(name)
    batch, runner = _batch(case, name), case.unpruned()
    features = runner.encode(batch.tiles)["image_features"]
    answer = runner.generate(batch.ids, batch.mask, features, STEPS)
    answer.check(transformers_answer(case.reference, STEPS, case.plan.image_token_id, **batch.inputs))
    # Several tokens at a time see what each saw.
    again = runner.replay(batch.ids, batch.mask, features, answer.tokens)
    np.testing.assert_allclose(again, answer.logits, rtol=0, atol=ROUNDING * np.abs(again).max())


# Their prompts are seen as a whole, or each image is.
NOT_CAUSAL = ("gemma3", "paligemma", "paligemma2")


def test_lowered_attention_equals_the_canonical_graph(
    case_of: Callable[[str], Case], name: str, tmp_path: Path
) -> None:
    case = case_of(name)
    check_lowered(case.graphs["decoder"], case.plan, tmp_path, one_graph=name not in NOT_CAUSAL, vision=slice(9, 20))


def test_pruned_equals_transformers_fed_the_same_tokens(case_of: Callable[[str], Case], name: str) -> None:
    case = case_of(name)
    batch, tokens = _batch(case, name), 4
    runner = case.pruned(tokens, case.family.scorers[0])
    encoded = runner.encode(batch.tiles)
    kept = encoded["kept_indices"]
    assert kept.shape == (len(batch.tiles), tokens)
    stays = batch.stays(case.plan.image_token_id, kept, case.plan.vision_tokens or 0)
    lengths = (stays & (batch.mask == 1)).sum(1)
    width = lengths.max()

    def shorten(values: Array, fill: int = 0) -> Array:
        rows = [row[stay & mask] for row, stay, mask in zip(values, stays, batch.mask == 1, strict=True)]
        rest = ((0, 0),) * (values.ndim - 2)
        return np.stack([np.pad(row, ((width - len(row), 0), *rest), constant_values=fill) for row in rows])

    ids, mask = shorten(batch.ids), shorten(batch.mask)
    answer = runner.generate(ids, mask, encoded["image_features"], STEPS)
    # transformers: its own features and text embeddings, of the whole prompt, shortened the same way.
    types = {"token_type_ids": batch.inputs["token_type_ids"]} if "token_type_ids" in batch.inputs else {}
    types = {key: torch.from_numpy(shorten(value.numpy())) for key, value in types.items()}
    embeds = shorten(_embeddings(case, batch))
    answer.check(transformers_answer_to(case, STEPS, embeds, mask, **types))


def _embeddings(case: Case, batch: Batch) -> Array:
    """Returns the embeddings of the unpruned prompts by transformers `[B,S,D]`."""
    with torch.no_grad():
        embeds = case.reference.get_input_embeddings()(batch.inputs["input_ids"])
        pixels = batch.inputs["pixel_values"]
        found = case.reference.get_image_features(pixels, return_dict=True).pooler_output
        width = embeds.shape[-1]
        features = torch.cat([rows.reshape(-1, width) for rows in found])
        embeds[batch.inputs["input_ids"] == case.plan.image_token_id] = features
    result: Array = embeds.numpy()
    return result


@pytest.mark.parametrize(
    ("name", "scorer"), [(name, scorer) for name, entry in ENTRIES.items() for scorer in entry.scorers]
)
def test_kept_tokens_are_those_that_the_tower_attends_to(
    case_of: Callable[[str], Case], name: str, scorer: str
) -> None:
    case, tokens = case_of(name), 5
    tiles = _batch(case, name).tiles
    relevance = _merged(_relevance(case, name, tiles, scorer), ENTRIES[name].merge)
    features = _features(case, tiles)
    score = hybrid_token_score(features, relevance, group_size=32, alpha=0.5, score_input="raw")
    kept = case.pruned(tokens, scorer).encode(tiles)["kept_indices"]
    np.testing.assert_array_equal(kept, select_topk(score, tokens))


def _relevance(case: Case, name: str, tiles: Array, scorer: str) -> Array:
    """Returns what patches `[B,P]` receive in the last attention that the features depend on, by transformers."""
    model = case.reference.model
    tower = model.vision_model if hasattr(model, "vision_model") else model.vision_tower
    implementation = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = tower(torch.from_numpy(tiles), output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(implementation)
    # VipLLaVA's reads layers -2, -4 and 2 of four.
    last = attentions[-2 if name == "vipllava" else -1].numpy()
    first = int(case.plan.has_cls_token)
    queries = slice(0, 1) if scorer == "cls" else slice(first, None)
    relevance: Array = last[:, :, queries, first:].mean(axis=(1, 2))
    return relevance


def _merged(patches: Array, merge: int) -> Array:
    """Means over squares of `merge` x `merge` patches: `[B,P]` -> `[B,N]`."""
    side = round(patches.shape[1] ** 0.5)
    squares = patches.reshape(len(patches), side // merge, merge, side // merge, merge)
    means: Array = squares.mean(axis=(2, 4)).reshape(len(patches), -1)
    return means


def _features(case: Case, tiles: Array) -> Array:
    """Returns the image features `[B,N,D]` by transformers."""
    pixels = torch.from_numpy(tiles)
    if case.family.model_type in ("idefics3", "smolvlm"):
        pixels = pixels[:, None]
    with torch.no_grad():
        found = case.reference.get_image_features(pixels, return_dict=True).pooler_output
    features: Array = torch.stack([rows.reshape(-1, rows.shape[-1]) for rows in found]).numpy()
    return features


def test_the_default_recipe_exports_and_the_bundle_prepares_prompts(
    tmp_path: Path, checkpoint_of: Callable[[str], Path], case_of: Callable[[str], Case], name: str
) -> None:
    case, recipe = case_of(name), make_recipe(DEFAULT_PRESET, {"keep": 0.4})
    target = tmp_path / "bundle"
    manifest = pipeline.export(
        checkpoint_of(name), recipe, target, name=name, force=False, progress=lambda *_: None, targets=RTX
    )
    check_engines(manifest, target)
    assert (manifest.parity["verdict"], manifest.parity["reason"]) == ("PASS", "")
    precisions = [value for layer, value in manifest.precision.items() if layer.startswith("decoder:")]
    # q, k, v, o, gate, up, down in each layer, and the head.
    assert sorted(precisions) == ["w4a4"] * 7 * case.plan.num_layers + ["w8a16"]
    # Where the stream cannot be rotated, the manifest says so.
    assert any("residual stream is not rotated" in note for note in manifest.notes) == ("gemma" in name)
    bundle, batch = QavpModel.from_bundle(target), _batch(case, name)
    texts, images = _prompts(name)
    prepared = bundle.prepare(images, texts, chat_template=False)
    kept = np.stack(list(prepared.kept_indices))
    stays = batch.stays(case.plan.image_token_id, kept, case.plan.vision_tokens or 0) & (batch.mask == 1)
    for row, valid, ids, stay in zip(prepared.input_ids, prepared.attention_mask, batch.ids, stays, strict=True):
        assert row[valid == 1].tolist() == ids[stay].tolist()
    assert [len(ids) for ids in bundle.generate_ids(images, texts, max_new_tokens=3, chat_template=False)] != [0, 0]


# Names as the checkpoints on the Hub have them.
LLAVA_LIKE = {
    "language_model.model.layers.1.mlp.up_proj.weight": "model.language_model.layers.1.mlp.up_proj.weight",
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.language_model.layers.1.mlp.up_proj.weight": "model.language_model.layers.1.mlp.up_proj.weight",
}
SIGLIP = {
    "vision_tower.vision_model.post_layernorm.bias": "model.vision_tower.post_layernorm.bias",
    "model.vision_tower.vision_model.post_layernorm.bias": "model.vision_tower.post_layernorm.bias",
}
PUBLISHED = {
    "vipllava": LLAVA_LIKE
    | {
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
        "multi_modal_projector.projector_layernorm.bias": "model.multi_modal_projector.projector_layernorm.bias",
    },
    "internvl": LLAVA_LIKE
    | {
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.encoder.layer.0.lambda_1": "model.vision_tower.encoder.layer.0.lambda_1",
        "multi_modal_projector.layer_norm.bias": "model.multi_modal_projector.layer_norm.bias",
    },
    "idefics3": {
        "model.text_model.layers.1.mlp.up_proj.weight": "model.text_model.layers.1.mlp.up_proj.weight",
        "model.vision_model.post_layernorm.bias": "model.vision_model.post_layernorm.bias",
        "model.connector.modality_projection.proj.weight": "model.connector.modality_projection.proj.weight",
        "lm_head.weight": "lm_head.weight",
    },
    "gemma3": LLAVA_LIKE
    | SIGLIP
    | {
        "multi_modal_projector.mm_soft_emb_norm.weight": "model.multi_modal_projector.mm_soft_emb_norm.weight",
        "multi_modal_projector.mm_input_projection_weight": "model.multi_modal_projector.mm_input_projection_weight",
    },
    "paligemma": LLAVA_LIKE
    | SIGLIP
    | {"multi_modal_projector.linear.weight": "model.multi_modal_projector.linear.weight"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_spelling_of_a_name_is_understood(case_of: Callable[[str], Case], name: str) -> None:
    case = case_of(name)
    parameters = {key for key, _ in case.reference.named_parameters()} | {"lm_head.weight"}
    for stored, parameter in PUBLISHED[name].items():
        assert case.family.parameter_names([stored]) == {parameter: stored}
        assert parameter in parameters


@pytest.mark.parametrize("side", [*range(2, 40), 64])
def test_patches_of_a_full_tile_have_the_positions_that_transformers_gives_them(side: int) -> None:
    config = Idefics3VisionConfig(hidden_size=1, image_size=side, patch_size=1)
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        # What each patch gets is the number of its position.
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side * side).unsqueeze(1))
        found = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))
    assert found.flatten().tolist() == full_tile_positions(side).tolist()
