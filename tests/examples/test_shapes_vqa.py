"""The shapes example: generator, training script and committed checkpoint."""

import random
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from data import TYPES, VOCABULARY, ShapesStream, write_samples
from evaluate import MAX_NORM_RATIO, answers, load, token_lengths
from lessons import Item, Question
from model import answer_logits, build_model, pack, see
from processing import build_processor, build_tokenizer
from questions import ask, ask_all
from rendering import NO_COLOR, NO_SHAPE, PLATE_SHAPE, RGB, render
from scenes import COLORS, SHAPES, Plate, QuestionType, Scene, Thing
from transformers import LlavaForConditionalGeneration, LlavaProcessor

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes_vqa"
MODEL = EXAMPLE / "model"
CELL_NAMES = [
    "top left",
    "top center",
    "top right",
    "middle left",
    "middle center",
    "middle right",
    "bottom left",
    "bottom center",
    "bottom right",
]


def build_scene(looks: list[str], digit: int = 7, plate_cell: int = 8) -> Scene:
    """A scene from words: `red circle@0` is a red circle in the middle of cell 0."""
    things = []
    for look in looks:
        color, shape, cell = re.split("[ @]", look)
        row, column = divmod(int(cell), 3)
        x, y = (column + 0.5) * 128 / 3, (row + 0.5) * 128 / 3
        things.append(Thing(COLORS.index(color), SHAPES.index(shape), int(cell), x, y, 9.0, 0.0))
    row, column = divmod(plate_cell, 3)
    plate = Plate(digit, plate_cell, (column + 0.5) * 128 / 3, (row + 0.5) * 128 / 3, False)
    return Scene(tuple(things), plate)


def solve(scene: Scene, text: str) -> str:
    """Answer a question from the pixel positions and names in a scene; raises if it is ambiguous."""
    objects = [(COLORS[t.color], SHAPES[t.shape], t.x, t.y) for t in scene.things]
    words = text.removesuffix(" ?").split()
    singular = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
    named = [singular.get(word, word) for word in words]
    fits = [
        o
        for o in objects
        if all(w == o[0] for w in named if w in COLORS) and all(w == o[1] for w in named if w in SHAPES)
    ]
    if words[:2] == ["what", "digit"]:
        return str(scene.plate.digit)
    if words[0] == "is":
        return "yes" if fits else "no"
    if words[0] == "how":
        return str(len(fits))
    if words[-1] == "digit":
        fits = [("", "", scene.plate.x, scene.plate.y)]
    (only,) = fits
    if words[:2] == ["what", "color"]:
        return only[0]
    if words[:2] == ["what", "shape"]:
        return only[1]
    across = ("left", "center", "right")[int(only[2] * 3 / 128)]
    return f"{('top', 'middle', 'bottom')[int(only[3] * 3 / 128)]} {across}"


def every_question(scene: Scene, kind: QuestionType, tries: int = 300) -> set[Question]:
    rng = random.Random(0)
    asked = (ask(scene, kind, rng) for _ in range(tries))
    return {question for question in asked if question is not None}


class TestGenerator:
    def test_same_seed_same_stream(self) -> None:
        first, second = ShapesStream("train", 3), ShapesStream("train", 3)
        for _ in range(3):
            one, two = first.batch(5), second.batch(5)
            assert one.scenes == two.scenes
            np.testing.assert_array_equal(one.images, two.images)
            np.testing.assert_array_equal(one.labels.color, two.labels.color)
            assert first.questions(one.scenes[0], 12) == second.questions(two.scenes[0], 12)

    def test_splits_and_seeds_are_disjoint(self) -> None:
        streams = [ShapesStream(split, seed).batch(200) for split in ("train", "heldout") for seed in range(5)]
        scenes = [scene for batch in streams for scene in batch.scenes]
        pictures = {image.tobytes() for batch in streams for image in batch.images}
        assert len(set(scenes)) == len(scenes)
        assert len(pictures) == len(scenes)

    def test_unknown_split(self) -> None:
        with pytest.raises(ValueError, match="unknown split"):
            ShapesStream("test", 0)  # type: ignore[arg-type]

    def test_items_rotate_through_types(self) -> None:
        items = ShapesStream("heldout", 5).items(20)
        assert [item.question.type for item in items] == [TYPES[i % 6] for i in range(20)]
        assert all(item.image.shape == (128, 128, 3) and item.image.dtype == np.uint8 for item in items)

    def test_answers_have_one_or_two_known_words(self) -> None:
        words = VOCABULARY.ids
        for item in ShapesStream("heldout", 6).items(300):
            assert 1 <= len(item.question.answer.split()) <= 2
            assert set(item.question.text.split()) | set(item.question.answer.split()) <= set(words)

    def test_scenes_keep_their_promises(self) -> None:
        stream = ShapesStream("train", 8)
        for scene in (stream.scene() for _ in range(500)):
            cells = [thing.cell for thing in scene.things] + [scene.plate.cell]
            assert 2 <= len(scene.things) <= 5
            assert len(set(cells)) == len(cells)
            for thing in scene.things:
                reach = 1.1 * thing.radius
                assert int((thing.x - reach) * 3 / 128) == int((thing.x + reach) * 3 / 128) == thing.cell % 3
                assert int((thing.y - reach) * 3 / 128) == int((thing.y + reach) * 3 / 128) == thing.cell // 3


class TestQuestions:
    def test_generated_answers_match_an_independent_solver(self) -> None:
        stream = ShapesStream("train", 21)
        seen = dict.fromkeys(TYPES, 0)
        for scene in (stream.scene() for _ in range(600)):
            for question in stream.questions(scene, 12):
                assert question.answer == solve(scene, question.text), (scene, question)
                seen[question.type] += 1
        assert min(seen.values()) > 300

    def test_color_and_shape_only_of_single_objects(self) -> None:
        scene = build_scene(["red circle@0", "blue circle@4", "blue square@2"])
        assert every_question(scene, "color") == {Question("color", "what color is the square ?", "blue")}
        assert every_question(scene, "shape") == {Question("shape", "what shape is the red object ?", "circle")}

    def test_nothing_unambiguous_to_ask(self) -> None:
        scene = build_scene(["red circle@0", "red circle@4"])
        assert not every_question(scene, "color")
        assert not every_question(scene, "shape")
        texts = {question.text for question in every_question(scene, "position")}
        assert texts == {"where is the digit ?"}

    def test_positions(self) -> None:
        for cell, name in enumerate(CELL_NAMES[:8]):
            scene = build_scene([f"green cross@{cell}", f"red cross@{(cell + 1) % 8}"])
            asked = {(q.text, q.answer) for q in every_question(scene, "position")}
            assert ("where is the green object ?", name) in asked
            assert ("where is the green cross ?", name) in asked
            assert ("where is the digit ?", "bottom right") in asked
            assert not any(text == "where is the cross ?" for text, _ in asked)

    def test_counts(self) -> None:
        scene = build_scene(["red circle@0", "red circle@1", "red square@2", "blue circle@3"])
        asked = {(q.text, q.answer) for q in every_question(scene, "count")}
        assert ("how many shapes are there ?", "4") in asked
        assert ("how many circles are there ?", "3") in asked
        assert ("how many red objects are there ?", "3") in asked
        assert ("how many blue objects are there ?", "1") in asked
        assert ("how many crosses are there ?", "0") in asked

    def test_yesno_has_hard_negatives(self) -> None:
        scene = build_scene(["orange circle@0", "blue square@1"])
        asked = every_question(scene, "yesno")
        yes = {q.text for q in asked if q.answer == "yes"}
        assert yes == {"is there an orange circle ?", "is there a blue square ?"}
        no = {q.text for q in asked if q.answer == "no"}
        assert {"is there an orange square ?", "is there a blue circle ?"} <= no

    def test_different_questions_only(self) -> None:
        scene = build_scene(["red circle@0", "red circle@4"])
        asked = ask_all(scene, 12, random.Random(1))
        assert len(set(asked)) == len(asked)


class TestRendering:
    def test_colors_and_labels_of_a_hand_built_scene(self) -> None:
        looks = ["red circle@0", "green square@1", "blue triangle@2", "yellow diamond@3", "purple cross@4"]
        scene = build_scene(looks, plate_cell=5)
        images, labels = render([scene], np.random.default_rng(0))
        for thing in scene.things:
            x, y = int(thing.x), int(thing.y)
            centre = images[0, y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
            assert np.abs(RGB - centre).sum(1).argmin() == thing.color
            patch = (y // 8) * 16 + x // 8
            assert (labels.color[0, patch], labels.shape[0, patch]) == (thing.color, thing.shape)
            assert labels.cell[0, patch] == thing.cell
        patch = int(scene.plate.y) // 8 * 16 + int(scene.plate.x) // 8
        assert (labels.shape[0, patch], labels.digit[0, patch]) == (PLATE_SHAPE, 7)
        assert labels.color[0, patch] == NO_COLOR
        assert list(labels.cell_shape[0, 5:7]) == [PLATE_SHAPE, NO_SHAPE]
        assert labels.cell[0, 255] == 8

    def test_foreground_is_small_and_background_is_grey(self) -> None:
        batch = ShapesStream("train", 4).batch(64)
        foreground = batch.labels.foreground
        assert 15 < foreground.sum(1).mean() < 40
        saturation = np.ptp(batch.images.astype(int), axis=3)
        by_patch = saturation.reshape(64, 16, 8, 16, 8).transpose(0, 1, 3, 2, 4).reshape(64, 256, 64).mean(2)
        shapes = batch.labels.color != NO_COLOR
        assert by_patch[shapes].mean() > 3 * by_patch[~foreground].mean()

    def test_larger_batches_render_the_same_scenes(self) -> None:
        scenes = ShapesStream("train", 9).batch(6).scenes
        _, together = render(scenes, np.random.default_rng(0))
        for index, scene in enumerate(scenes):
            _, alone = render([scene], np.random.default_rng(0))
            np.testing.assert_array_equal(together.shape[index], alone.shape[0])


class TestText:
    def test_everyday_spelling(self) -> None:
        tokenizer = build_tokenizer(VOCABULARY)
        want = tokenizer.tokenize("<bos> <image> Q what color is the circle ? A")
        assert tokenizer.tokenize("<bos> <image> Q What colour is the Circle? A") == want
        assert want[:3] == ["<bos>", "<image>", "Q"]
        assert tokenizer.tokenize("Q Is there a cross? A")[3] == "a"

    def test_decoding(self) -> None:
        tokenizer, ids = build_tokenizer(VOCABULARY), VOCABULARY.ids
        row = [ids["top"], ids["left"], ids["<eos>"], ids["<pad>"]]
        assert tokenizer.decode(row, skip_special_tokens=True) == "top left"

    def test_packed_questions_answer_as_if_alone(self) -> None:
        torch.manual_seed(0)
        model, processor = build_model(VOCABULARY).train(False), build_processor(VOCABULARY)
        stream = ShapesStream("train", 2)
        batch = stream.batch(1)
        asked = stream.questions(batch.scenes[0], 6)
        with torch.no_grad():
            inputs = processor(text="<image>", images=batch.images[0], return_tensors="pt")
            logits, target = answer_logits(model, see(model, inputs["pixel_values"]).tokens, pack([asked], VOCABULARY))
            ends = [i for i, token in enumerate(target.tolist()) if token == VOCABULARY.ids["<eos>"]]
            for question, end in zip(asked, ends, strict=True):
                text = f"<bos> <image> Q {question.text} A {question.answer}"
                alone = model(**processor(text=text, images=batch.images[0], return_tensors="pt")).logits
                torch.testing.assert_close(logits[end], alone[0, -1], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return load(MODEL)


class TestCheckpoint:
    def test_shape_and_size(self, checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
        model, processor = checkpoint
        assert sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
        assert sum(file.stat().st_size for file in MODEL.iterdir()) < 12 * 2**20
        assert (model.config.vision_feature_layer, model.config.image_seq_length) == (-2, 256)
        content = [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]
        template: Callable[..., str] = processor.apply_chat_template  # annotated without parts
        prompt = template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        assert prompt == "<bos> <image> Q what color is the circle ? A"

    def test_any_picture_size(self, checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
        picture = np.zeros((200, 300, 3), np.uint8)
        inputs = checkpoint[1](text="<bos> <image> Q", images=picture, return_tensors="pt")
        assert tuple(inputs["pixel_values"].shape) == (1, 3, 128, 128)
        assert int((inputs["input_ids"] == VOCABULARY.ids["<image>"]).sum()) == 256

    def test_answers_held_out_questions(self, checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
        items = ShapesStream("heldout", 77).items(60)
        said = list(answers(*checkpoint, items, items, batch=30))
        right = sum(answer == item.question.answer for answer, item in zip(said, items, strict=True))
        assert right >= 48  # chance is about 14

    def test_token_lengths_carry_no_artefact(
        self, checkpoint: tuple[LlavaForConditionalGeneration, LlavaProcessor]
    ) -> None:
        items: list[Item] = ShapesStream("heldout", 78).items(30)
        foreground, background = token_lengths(checkpoint[0], items)
        assert max(foreground, background) / min(foreground, background) < MAX_NORM_RATIO


def test_samples_come_from_the_documented_seed(tmp_path: Path) -> None:
    assert write_samples(tmp_path, images=2, seed=12) == 12
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert (EXAMPLE / "samples" / "questions.jsonl").read_text().splitlines()[:12] == lines


def test_training_script_end_to_end(tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLE / "train.py"), "--out", str(tmp_path / "out"), "--steps", "8"]
    result = subprocess.run(
        [*script, "--stages", str(tmp_path / "stages")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    steps = [int(step) for step in re.findall(r"^\S+ (\d+): loss", result.stdout, re.MULTILINE)]
    assert len(steps) == 3
    assert all(before < after for before, after in pairwise(steps))
    model, processor = load(tmp_path / "out")
    items = ShapesStream("heldout", 1).items(6)
    assert len(list(answers(model, processor, items, items, batch=6))) == 6
    assert (tmp_path / "out" / "learning_curves.png").stat().st_size < 150_000
