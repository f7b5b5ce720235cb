"""The scorer `text`, from the checkpoints to the answers, against transformers' CLIP and the NumPy reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPModel

from qavp_export import QavpModel, pipeline
from qavp_export.cli.common import run_command
from qavp_export.cli.export import app
from qavp_export.engines.ort.lowering.capabilities import CPU
from qavp_export.engines.ort.lowering.vision import lower_vision
from qavp_export.errors import CheckpointError, GraphError, InputError, ParityError, PromptError, RecipeError
from qavp_export.manifest import Manifest
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import text_relevance
from qavp_export.parity import question as parity_question
from qavp_export.passes import PruneVisionTokens
from qavp_export.recipe import make_recipe
from qavp_export.runtime.prompts import EncodedPrompt
from qavp_export.source import open_source
from qavp_export.text_tower import open_text_tower
from qavp_export.verify import verify
from tests.families.harness import open_graph
from tests.models.clip import CONTEXT, END, clip_relevance, make_clip
from tests.models.llava_next import make_llava_next
from tests.models.tiny import TinySpec, make_llava
from tests.models.vipllava import make_vipllava

KEPT = 8
# The tiny tokenizer writes a token for each letter: the last question does not fit.
QUESTIONS = ("is it a ?", "left", "what is the color of the circle")


@dataclass(frozen=True)
class Case:
    """A tiny LLaVA, the CLIP of its tower, and the latter as transformers loads it."""

    llava: Path
    clip: Path

    @property
    def model(self) -> Any:
        """CLIP in float32."""
        kind: Any = CLIPModel
        return kind.from_pretrained(self.clip, dtype=torch.float32).eval()

    def relevance(self, pixels: np.ndarray, questions: list[str]) -> np.ndarray:
        """What transformers' CLIP and the reference say of patches; the tower is CLIP's own."""
        return clip_relevance(self.clip, pixels, questions)

    def export(self, target: Path, preset: str = "none", **fields: Any) -> Manifest:
        """Exports with the scorer `text`."""
        recipe = make_recipe(preset, {"semantic": "text", "keep": 0.3, "select": "topk"} | fields)
        return pipeline.export(
            self.llava,
            recipe,
            target,
            name="tiny",
            force=False,
            progress=lambda *_: None,
            clip=(self.clip, "tiny-clip"),
        )


@pytest.fixture(scope="module")
def case(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tiny_llava, make_clip(tmp_path_factory.mktemp("clip") / "clip", tiny_llava))


@pytest.fixture(scope="module")
def bundle(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("text") / "bundle"
    case.export(target)
    return target


def _images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


def _traced(case: Case) -> ir.Model:
    source = open_source(case.llava, "tiny")
    source = replace(source, text_tower=open_text_tower(case.clip, "clip", source.config))
    graphs, _ = pipeline.trace(source, lambda *_: None)
    return graphs["vision_encoder"]


@pytest.mark.parametrize("make", [None, make_vipllava], ids=["llava", "vipllava, three layers, CLIP as published"])
def test_the_graph_compares_patches_with_questions_as_clip_does(
    case: Case, make: Callable[[Path], Path] | None, tmp_path: Path
) -> None:
    if make is not None:
        llava = make(tmp_path / "llava")
        case = Case(llava, make_clip(tmp_path / "clip", llava, eos_token_id=2))
    graph = _traced(case)
    assert [(value.name, list(value.shape or ())) for value in graph.graph.inputs] == [
        ("pixel_values", ["batch", 3, 40, 40]),
        ("text_input_ids", ["batch", "text_tokens"]),
    ]
    pixels = np.random.default_rng(0).standard_normal((3, 3, 40, 40)).astype(np.float32)
    ids = AutoTokenizer.from_pretrained(case.clip)(list(QUESTIONS), padding=True, truncation=True, max_length=CONTEXT)
    feeds = {"pixel_values": pixels, "text_input_ids": np.array(ids["input_ids"], np.int64)}
    (relevance,) = open_graph(graph).run(["token_relevance"], feeds)
    expected = case.relevance(pixels, list(QUESTIONS))
    # Cosines, up to float32 sums in another order; 3e-7 was seen.
    np.testing.assert_allclose(relevance, expected, atol=3e-6)
    assert np.ptp(expected, axis=0).max() > 0.1


def test_the_bundle_says_what_it_reads(case: Case, bundle: Path) -> None:
    manifest = verify(bundle)
    assert manifest.parity["verdict"] == "PASS"
    assert manifest.recipe["semantic"] == "text"
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in manifest.components["vision_encoder"].inputs}
    assert inputs["text_input_ids"] == ("int64", ["batch", "text_tokens"])
    assert [spec.name for spec in manifest.components["vision_encoder"].outputs] == ["image_features", "kept_indices"]
    assert vars(manifest.vision_tokens.question) == {
        "source": "tiny-clip",
        "tokenizer": "clip",
        "context_length": CONTEXT,
        "eos_token_id": AutoTokenizer.from_pretrained(case.clip).convert_tokens_to_ids(END),
    }
    copied = {entry.path for entry in manifest.files if entry.path.startswith("clip/")}
    assert copied == {"clip/config.json", "clip/tokenizer.json", "clip/tokenizer_config.json"}


@pytest.mark.parametrize("engine", ["ort-reference", "ort-cpu"])
def test_tokens_are_kept_by_the_question(case: Case, bundle: Path, engine: str) -> None:
    model = QavpModel.from_bundle(bundle, engine)
    images = _images(4)
    # Two images of one prompt share its question; the batch pads the shorter questions.
    shown = [images[:2], images[2], images[3]]
    prepared = model.prepare(shown, list(QUESTIONS))
    processor = model.preparer._encoder._processor
    pixels = np.stack([processor.image_processor(image)["pixel_values"][0] for image in images]).astype(np.float32)
    asked = [QUESTIONS[0], *QUESTIONS]
    auto: Any = AutoModelForImageTextToText
    llava = auto.from_pretrained(case.llava, dtype=torch.float32).eval()
    with torch.no_grad():
        features = torch.stack(list(llava.get_image_features(torch.from_numpy(pixels)).pooler_output)).numpy()
    scores = hybrid_token_score(features, case.relevance(pixels, asked), group_size=32)
    np.testing.assert_array_equal(np.stack(prepared.kept_indices), select_topk(scores, KEPT))
    # One by one, as in a batch; and without the chat template, where the image's place is no part of the question.
    alone = [model.prepare(image, text).kept_indices for image, text in zip(shown, QUESTIONS, strict=True)]
    np.testing.assert_array_equal(np.concatenate(alone), np.stack(prepared.kept_indices))
    raw = model.prepare(images[2], f"<image>\n{QUESTIONS[1]}", chat_template=False).kept_indices
    np.testing.assert_array_equal(raw, alone[1])


def test_another_question_keeps_other_tokens_and_a_long_one_is_cut(bundle: Path) -> None:
    model = QavpModel.from_bundle(bundle)
    image = _images(1)[0]
    kept = {text: model.prepare(image, text).kept_indices[0].tolist() for text in (*QUESTIONS, "what is the")}
    assert len({tuple(kept[text]) for text in QUESTIONS}) == 3
    # Between start and end there is room for nine letters.
    assert kept["what is the"] == kept[QUESTIONS[2]]


def test_answers_and_logits(bundle: Path) -> None:
    model = QavpModel.from_bundle(bundle)
    images = _images(3)
    shown: list[Any] = [[images[0], images[1]], images[2], None]
    texts = [*QUESTIONS[:2], "a circle"]
    together = model.generate_ids(shown, texts, max_new_tokens=5)
    alone = [model.generate_ids(image, text, max_new_tokens=5)[0] for image, text in zip(shown, texts, strict=True)]
    assert together == alone
    logits = model.logits(images[2], texts[1])
    # Of the largest, float32 sums in another order: the batch is padded.
    padded = model.logits(shown, texts)[1, -logits.shape[1] :]
    np.testing.assert_allclose(padded, logits[0], atol=1e-4 * np.abs(logits).max())


def test_token_ids_alone_are_refused(bundle: Path) -> None:
    preparer = QavpModel.from_bundle(bundle).preparer
    encoded = preparer._encoder.encode(QUESTIONS[0], _images(1), True)
    with pytest.raises(PromptError, match="selects image tokens by the question"):
        preparer.prepare_encoded([EncodedPrompt(encoded.input_ids, encoded.images, encoded.labels)])


def test_calibration_and_a_range_of_budgets(case: Case, tmp_path: Path) -> None:
    manifest = case.export(tmp_path / "bundle", "gptq", keep=0.3, calibration_samples=1, select="dpp")
    assert manifest.parity["verdict"] == "PASS"
    case.export(tmp_path / "range", keep=None, keep_range=(0.1, 0.5))
    model = QavpModel.from_bundle(tmp_path / "range")
    assert [len(model.prepare(_images(1)[0], "left", keep=keep).kept_indices[0]) for keep in (0.1, 0.5)] == [3, 13]


def test_a_bundle_that_keeps_all_tokens_reads_no_question(case: Case, tmp_path: Path) -> None:
    manifest = case.export(tmp_path / "bundle", keep=1.0)
    assert [spec.name for spec in manifest.components["vision_encoder"].inputs] == ["pixel_values"]
    assert manifest.vision_tokens.question is None


def test_what_scores_tokens_is_not_rounded(bundle: Path) -> None:
    graph = ir.load(bundle / "vision_encoder" / "model.onnx")
    rounded = lower_vision(graph, "w8a8", CPU).precision
    # Three layers of six products, of which the last feeds nothing, and the projector's two.
    assert len(rounded) == 2 * 6 + 2
    assert not [name for name in rounded if "text" in name or "visual_projection" in name]


def test_parity_sees_another_sign(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_question, "text_relevance", lambda image, text: -text_relevance(image, text))
    with pytest.raises(ParityError, match="of the kept tokens differ"):
        case.export(tmp_path / "bundle", alpha=1.0)


def _copy(case: Case, folder: Path, file: str, **changes: Any) -> Path:
    """A copy of CLIP's checkpoint with other settings."""
    shutil.copytree(case.clip, folder)
    settings = json.loads((folder / file).read_text())
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        (settings[section] if section else settings)[field] = value
    (folder / file).write_text(json.dumps(settings))
    return folder


def test_clips_that_do_not_fit_are_refused(case: Case, tmp_path: Path) -> None:
    smaller = make_clip(tmp_path / "smaller", case.llava, image_size=32, num_hidden_layers=2)
    stranger = make_clip(tmp_path / "stranger", case.llava, image_size=40)
    no_clip = _copy(case, tmp_path / "no_clip", "config.json", model_type="siglip")
    untold = _copy(case, tmp_path / "untold", "config.json", text_config__eos_token_id=7)
    for clip, kind, message in (
        (smaller, RecipeError, "is not the model's: it has num_hidden_layers 2, not 3; image_size 32, not 40"),
        (stranger, RecipeError, r"has other weights than the model's \(their position embeddings have cosine -?0\.\d"),
        (no_clip, CheckpointError, "holds no CLIP model: model_type is 'siglip'"),
        (case.llava, CheckpointError, "holds no CLIP model: model_type is 'llava'"),
        (untold, CheckpointError, "ends a text with token 55, and config.json reads token 7"),
    ):
        with pytest.raises(kind, match=message):
            replace(case, clip=clip).export(tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_llava_next, "semantic 'text' is not available for llava_next, which has no CLIP tower"),
        (lambda folder: make_llava(folder, TinySpec(vision="siglip")), "needs a CLIP vision tower, .* siglip"),
    ],
)
def test_models_that_have_no_such_tower_are_refused(
    case: Case, make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(case, llava=make(tmp_path / "llava")).export(tmp_path / "bundle")


def test_a_graph_that_reads_no_question_is_refused(tiny_llava: Path) -> None:
    graphs, _ = pipeline.trace(open_source(tiny_llava, "tiny"), lambda *_: None)
    with pytest.raises(GraphError, match="needs a graph that computes the relevance of its tokens to a question"):
        PruneVisionTokens(tokens=KEPT, semantic="text")(graphs["vision_encoder"])


_READ = ("text_model.", "text_projection.", "visual_projection.", "vision_model.post_layernorm.")


def _run(*argv: str) -> int:
    return run_command(app, "qavp-export", list(argv))


def test_the_command_line(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bundle"
    argv = ["--model", str(case.llava), "--recipe", "none", "-o", str(target), "--json"]
    assert _run(*argv, "--semantic", "text") == InputError.exit_code
    assert "semantic 'text' needs CLIP's text tower, which the checkpoint does not hold; give --clip" in _error(capsys)
    assert _run(*argv, "--clip", str(case.clip)) == InputError.exit_code
    assert "--clip is read by semantic 'text' alone" in _error(capsys)
    assert not target.exists()
    assert _run(*argv, "--semantic", "text", "--clip", str(case.clip)) == 0
    assert Manifest.read(target).vision_tokens.question is not None
    capsys.readouterr()
    assert _run(*argv, "--semantic", "text", "--clip", str(case.clip), "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert _run(*argv, "--dry-run") == 0
    # What is read of CLIP: text tower, two projections and a norm, in 16 bits but for vectors.
    parts = [part for name, part in case.model.named_parameters() if name.startswith(_READ)]
    more = sum(part.numel() * (2 if part.dim() > 1 else 4) for part in parts)
    assert planned["bundle_bytes"] - json.loads(capsys.readouterr().out)["bundle_bytes"] == more
    assert _run(*argv, "--semantic", "text", "--dry-run") == InputError.exit_code


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err
