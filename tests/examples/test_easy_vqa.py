"""The easy-VQA task of the example, on a few pictures in the layout of the package easy-vqa."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import easy_vqa_data
import numpy as np
import pytest
import torch
from data import VOCABULARY as SHAPES_VOCABULARY
from easy_vqa_data import KINDS, VOCABULARY, EasyVqaStream, foreground, heldout_items, load_pictures, to_question, told
from evaluate import evaluate, load
from lessons import BACKGROUND, UNKNOWN, Attribute, Question
from losses import dense_loss
from model import answer_logits, build_model, pack, see
from PIL import Image, ImageDraw
from processing import build_processor, build_tokenizer, to_pixels
from rich.console import Console
from rich.progress import Progress
from tasks import TASKS, Stage
from train import Trainer

MODEL = Path(__file__).parents[2] / "examples" / "shapes_vqa" / "model"
# What the package's README shows of its functions, over its own layout of files.
PACKAGE = """
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"

def _questions(split):
    return tuple(zip(*json.loads((DATA / split / "questions.json").read_text())))

def _paths(split):
    return {int(path.stem): str(path) for path in (DATA / split / "images").glob("*.png")}

def get_train_questions():
    return _questions("train")

def get_test_questions():
    return _questions("test")

def get_train_image_paths():
    return _paths("train")

def get_test_image_paths():
    return _paths("test")
"""
# All words of version 1.0, counted in its two questions.json.
PACKAGE_WORDS = (
    "is shape the a image there not what present does contain in color no circle rectangle triangle brown yellow "
    "gray teal black red green blue of yes"
)
RGB = {"red": (255, 0, 0), "teal": (0, 128, 128), "black": (0, 0, 0), "yellow": (255, 255, 0)}
TRAIN = {
    0: ("circle", "red", [("what color is the shape?", "red"), ("is there a circle?", "yes")]),
    1: ("rectangle", "teal", [("what is the teal shape?", "rectangle"), ("is no red shape present?", "yes")]),
    2: ("circle", "black", [("is there not a black shape?", "no"), ("does the image contain a triangle?", "no")]),
    3: ("rectangle", "yellow", [("what shape is present?", "rectangle"), ("what color is the rectangle?", "yellow")]),
    40: ("circle", "teal", [("what color is the circle?", "teal"), ("is there not a circle in the image?", "no")]),
}
TEST = {
    0: ("rectangle", "red", [("what is the color of the rectangle?", "red"), ("is there a circle?", "no")]),
    1: ("circle", "yellow", [("what is the yellow shape?", "circle"), ("does the image not contain a circle?", "no")]),
}
BOX = (16, 8, 31, 27)  # left, top, right, bottom of every object, inclusive, in a picture of 64 pixels


def write_split(folder: Path, pictures: dict[int, tuple[str, str, list[tuple[str, str]]]]) -> None:
    (folder / "images").mkdir(parents=True)
    records = []
    for number, (shape, color, asked) in pictures.items():
        image = Image.new("RGB", (64, 64), (250, 235 + number % 10, 240))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)(BOX, fill=RGB[color])
        image.save(folder / "images" / f"{number}.png")
        records += [[text, answer, number] for text, answer in asked]
    (folder / "questions.json").write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package easy_vqa of five training and two test pictures, importable while the module's tests run."""
    folder = tmp_path_factory.mktemp("site") / "easy_vqa"
    write_split(folder / "data" / "train", TRAIN)
    write_split(folder / "data" / "test", TEST)
    (folder / "__init__.py").write_text(PACKAGE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        patch.setitem(sys.modules, "easy_vqa", None)  # so that whatever was there is put back at the end
        del sys.modules["easy_vqa"]
        yield folder


@pytest.mark.usefixtures("package")
class TestData:
    def test_kinds_of_questions(self) -> None:
        assert to_question("what color is the shape?", "teal") == Question("color", "what color is the shape ?", "teal")
        assert to_question("what shape does the image contain?", "circle").type == "shape"
        assert to_question("is there a blue shape?", "no").type == "yesno"
        assert to_question("is there not a blue shape?", "no").type == "negated"
        assert to_question("is no circle present?", "yes").type == "negated"

    @pytest.mark.parametrize(
        ("text", "answer", "told_word"),
        [
            ("what is the blue shape?", "circle", "blue"),
            ("what is the blue shape?", "circle", "circle"),
            ("is there a blue shape?", "yes", "blue"),
            ("is there a blue shape?", "no", None),
            ("is there not a blue shape?", "no", "blue"),
            ("is no blue shape present?", "yes", None),
        ],
    )
    def test_what_an_answer_tells(self, text: str, answer: str, told_word: str | None) -> None:
        names = told([to_question(text, answer)]) & {"blue", "circle", "rectangle"}
        assert (told_word in names) if told_word else not names

    def test_splits(self) -> None:
        found = {
            split: [int(picture.path.stem) for picture in load_pictures(split)]
            for split in ("train", "development", "test")
        }
        assert found == {"train": [1, 2, 3], "development": [0, 40], "test": [0, 1]}
        assert {picture.path.parts[-3] for picture in load_pictures("test")} == {"test"}
        assert {picture.path.parts[-3] for picture in load_pictures("development")} == {"train"}

    def test_colour_and_shape_are_what_the_questions_tell(self) -> None:
        colors, shapes = easy_vqa_data.COLORS, easy_vqa_data.SHAPES
        rows = [(picture.color, picture.shape) for picture in load_pictures("train")]
        teal, black, yellow = (colors.index(name) for name in ("teal", "black", "yellow"))
        # Nothing tells the second picture's shape: that it is no triangle leaves two.
        assert rows == [(teal, shapes.index("rectangle")), (black, UNKNOWN), (yellow, shapes.index("rectangle"))]

    def test_pictures_are_scaled_as_the_processor_scales(self) -> None:
        picture = load_pictures("train")[0]
        processor = build_processor(VOCABULARY)
        inputs = processor(text="<image>", images=Image.open(picture.path), return_tensors="pt")
        ours = to_pixels(torch.from_numpy(picture.image()[None]))
        torch.testing.assert_close(ours, inputs["pixel_values"], rtol=0, atol=1e-6)  # float32 rounding of values near 2

    def test_labels_of_a_rectangle(self) -> None:
        lesson = EasyVqaStream("train", 0).lesson(3, 12)
        number = next(i for i, asked in enumerate(lesson.questions) if any("teal" in q.text for q in asked))
        labels = lesson.labels
        # Pixels 16 to 31 across and 8 to 27 down are, twice as large, patches 4 to 7 across and 2 to 6 down.
        expected = np.zeros((16, 16), bool)
        expected[2:7, 4:8] = True
        np.testing.assert_array_equal(labels.foreground[number].reshape(16, 16), expected)
        shape = np.array(labels.shape.words)[labels.shape.truth[number]].reshape(16, 16)
        assert set(shape[expected]) == {"rectangle"}
        assert set(shape[~expected]) == {BACKGROUND}
        color = labels.color.truth[number].reshape(16, 16)
        assert set(color[expected]) == {easy_vqa_data.COLORS.index("teal")}
        assert set(color[~expected]) == {len(easy_vqa_data.COLORS)}
        rows, columns = (np.array(a.words)[a.truth[number]].reshape(16, 16) for a in labels.others)
        # The object's middle, (48, 36) of 128, is in the middle column and the top row; so are all of its patches.
        assert set(rows[expected]) == {"top"}
        assert set(columns[expected]) == {"center"}
        assert (rows[15, 0], columns[15, 0]) == ("bottom", "left")
        assert [int(truth[number, 0]) for truth in labels.scene] == [easy_vqa_data.COLORS.index("teal"), 1]

    def test_plain_picture_has_no_foreground(self) -> None:
        assert not foreground(np.full((2, 128, 128, 3), 240, np.uint8)).any()

    def test_every_picture_once_before_any_twice(self) -> None:
        stream = EasyVqaStream("train", 5)
        seen = [stream.lesson(1, 1).images.tobytes() for _ in range(15)]
        assert [len(set(seen[start : start + 3])) for start in range(0, 15, 3)] == [3] * 5

    def test_same_seed_same_stream(self) -> None:
        first, second, other = (EasyVqaStream("train", seed) for seed in (3, 3, 4))
        lessons = [[stream.lesson(2, 1) for _ in range(8)] for stream in (first, second, other)]
        for one, two in zip(lessons[0], lessons[1], strict=True):
            assert one.questions == two.questions
            np.testing.assert_array_equal(one.images, two.images)
        assert [lesson.questions for lesson in lessons[0]] != [lesson.questions for lesson in lessons[2]]

    def test_heldout_items_are_the_test_split(self) -> None:
        items = heldout_items(100, 1)
        expected = {to_question(text, answer) for _, _, asked in TEST.values() for text, answer in asked}
        assert {item.question for item in items} == expected
        assert [item.question.type for item in items] == list(KINDS)
        assert len(heldout_items(3, 1)) == 3
        # Each question comes with its own picture: the object's middle has its colour.
        colors = {"red": RGB["red"], "circle": RGB["yellow"]}
        for item in items:
            if item.question.answer in colors:
                assert tuple(item.image[36, 48]) == colors[item.question.answer]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(SystemExit, match="pip install easy-vqa"):
        load_pictures("train")


class TestVocabulary:
    def test_holds_every_word_of_the_package(self) -> None:
        tokenizer = build_tokenizer(VOCABULARY)
        tokens = tokenizer.tokenize(PACKAGE_WORDS + "?")
        assert "<unk>" not in tokens
        assert len(tokens) == len(PACKAGE_WORDS.split()) + 1

    @pytest.mark.parametrize("name", list(TASKS))
    def test_tasks_have_the_same_number_of_tokens(self, name: str) -> None:
        words = TASKS[name].vocabulary.words
        assert len(set(words)) == len(words)
        assert sorted(TASKS[name].vocabulary.ids.values()) == list(range(64))

    def test_the_committed_checkpoint_has_the_words_of_the_shapes_task(self, tmp_path: Path) -> None:
        build_processor(SHAPES_VOCABULARY).save_pretrained(tmp_path)
        for file in tmp_path.iterdir():
            assert file.read_bytes() == (MODEL / file.name).read_bytes(), file.name

    def test_the_committed_checkpoint_is_the_one_that_was_published(self) -> None:
        digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
        assert digest == "ea8ae26b666be0f2538acab04321f412cd46f63dada4627df42041714a28b6ad"

    def test_a_checkpoint_of_another_task_is_refused(self) -> None:
        with pytest.raises(ValueError, match="trained on another task"):
            evaluate(MODEL, TASKS["easy-vqa"], [], 1, Console(quiet=True))


def weighted_loss(tokens: torch.Tensor, attribute: Attribute, shown: torch.Tensor) -> float:
    """Mean cross-entropy of an attribute in float64, background patches a tenth; tokens hold each id's score."""
    ids = [VOCABULARY.ids[word] for word in attribute.words]
    total = weight = 0.0
    for token, truth, is_shown in zip(tokens.flatten(0, 1), attribute.truth.flatten(), shown.flatten(), strict=True):
        if truth in range(len(ids)):
            scores = 6.0 * token[ids].double()
            share = 1.0 if is_shown else 0.1
            total += share * float(scores.logsumexp(0) - scores[truth])
            weight += share
    return total / weight


@pytest.mark.usefixtures("package")
class TestTraining:
    def test_patches_of_unknown_shape_take_no_part(self) -> None:
        labels = EasyVqaStream("train", 0).lesson(3, 12).labels
        unknown = torch.from_numpy(labels.shape.truth == UNKNOWN)
        assert unknown.sum() > 10  # the black circle's patches
        # With words at right angles, a token's coordinates are its scores for the words.
        torch.manual_seed(0)
        table, tokens = torch.eye(64), torch.randn(3, 256, 64)
        shown = torch.from_numpy(labels.foreground)
        known = shown & ~unknown
        shapes = torch.tensor([VOCABULARY.ids[word] for word in labels.shape.words])
        named = tokens[known][:, shapes].argmax(1) == torch.from_numpy(labels.shape.truth)[known]
        loss, right = dense_loss(tokens, table, labels, VOCABULARY)
        assert float(right) == pytest.approx(float(named.float().mean()), abs=1e-6)  # one float32 mean

        expected = np.mean([weighted_loss(tokens, attribute, shown) for attribute in labels.attributes])
        assert float(loss) == pytest.approx(expected, rel=1e-5)  # float32 sums of 768 terms

        for word, matters in (("circle", False), ("black", True), ("top", True)):
            moved = tokens.clone()
            moved[..., VOCABULARY.ids[word]] += 3.0 * unknown
            assert (dense_loss(moved, table, labels, VOCABULARY)[0] != loss) == matters, word

    def test_stages_checkpoint_and_measurement(self, tmp_path: Path) -> None:
        stages = (Stage("align", 2, 2, 1e-3, 0.1, decoder=False), Stage("full", 2, 2, 1e-3, 0.0))
        task = replace(
            TASKS["easy-vqa"],
            schedule=stages,
            development=lambda: EasyVqaStream("development", 0).lesson(2, 12),
        )
        trainer = Trainer(task, 0, Console(quiet=True))
        with Progress(disable=True) as progress:
            for index, stage in enumerate(task.schedule):
                trainer.run(stage, index, progress)
        trainer.save(tmp_path)
        assert [point.step for point in trainer.history.points] == [2, 4]
        assert list(trainer.history.points[-1].accuracy) == ["color", "yesno", "negated"]  # what pictures 0 and 40 ask
        model, processor = load(tmp_path)
        assert processor.tokenizer.get_vocab() == VOCABULARY.ids
        assert model.config.text_config.vocab_size == 64
        report = evaluate(tmp_path, task, heldout_items(4, 0), 2, Console(quiet=True))
        assert {kind: row.questions for kind, row in report.types.items()} == dict.fromkeys(KINDS, 1)
        assert report.accuracy == sum(row.accuracy for row in report.types.values()) / 4

    def test_packed_questions_have_the_tasks_ids(self) -> None:
        torch.manual_seed(0)
        model = build_model(VOCABULARY).train(False)
        question = to_question("is there not a teal shape?", "no")
        packed = pack([[question]], VOCABULARY)
        tokenizer = build_tokenizer(VOCABULARY)
        ids = tokenizer("Q is there not a teal shape? A no", add_special_tokens=False)["input_ids"]
        assert packed.ids[0, : len(ids)].tolist() == ids
        with torch.no_grad():
            tokens = see(model, torch.zeros(1, 3, 128, 128)).tokens
            logits, target = answer_logits(model, tokens, packed)
        assert target.tolist() == tokenizer.convert_tokens_to_ids(["no", "<eos>"])
        assert logits.shape == (2, 64)
