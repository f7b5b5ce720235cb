"""easy-VQA (Zhou, 2019) as a task: pictures and questions from the package `easy-vqa`, one shape per picture.

The package holds pictures of 64 x 64 pixels, each with one coloured shape on a plain background, and says nothing
about them but the answers to its questions. What a patch shows is therefore derived: a patch that differs from the
background shows the shape; its colour and shape are whatever the picture's own questions and answers tell.
"""

import importlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import numpy as np
from lessons import (
    BACKGROUND,
    COLUMNS,
    GRID,
    PATCH_CELL,
    ROWS,
    UNKNOWN,
    Attribute,
    Item,
    Labels,
    Lesson,
    Question,
    places,
)
from numpy.typing import NDArray
from PIL import Image
from processing import IMAGE_SIZE, PATCH_SIZE, Vocabulary

Kind = Literal["color", "shape", "yesno", "negated"]
Split = Literal["train", "development", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)

COLORS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SHAPE_WORDS = (*SHAPES, BACKGROUND)
NO_COLOR, NO_SHAPE = len(COLORS), len(SHAPES)
NEGATIONS = frozenset(("no", "not"))
GRAMMAR = "? what is the a color of shape image does contain in there present not no yes"
VOCABULARY = Vocabulary((*GRAMMAR.split(), *COLORS, *SHAPES, *ROWS, *COLUMNS, BACKGROUND))
SCENE_CLASSES = (len(COLORS), len(SHAPES))  # of the picture's one object

DEVELOPMENT_EVERY = 40  # of the package's training pictures, one in so many is never trained on
CONTRAST = 60  # grey levels, summed over the channels; scaling rings up to 54 beside an edge, shapes differ by over 200
MIN_COVER = 10  # pixels of 64 that must differ from the background, as in rendering.py


@dataclass(frozen=True)
class Picture:
    """One picture of the package.

    Attributes:
        path: its file.
        questions: everything that the package asks about it.
        color: index into `COLORS`, or `UNKNOWN` where no question tells.
        shape: index into `SHAPES`, or `UNKNOWN`.
    """

    path: Path
    questions: tuple[Question, ...]
    color: int
    shape: int

    def image(self) -> NDArray[np.uint8]:
        """[128, 128, 3], uint8: scaled as the image processor scales it."""
        with Image.open(self.path) as file:
            scaled = file.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        return np.array(scaled)


def _package() -> ModuleType:
    """The package; exits with one line if it is not installed."""
    try:
        return importlib.import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise SystemExit("the task easy-vqa needs a package that is not installed: pip install easy-vqa") from error


def to_question(text: str, answer: str) -> Question:
    """Name a question's kind, and set its question mark apart as the tokenizer does."""
    words = text.replace("?", " ?").split()
    kind: Kind = "color" if answer in COLORS else "shape"
    if answer in ("yes", "no"):
        kind = "negated" if NEGATIONS.intersection(words) else "yesno"
    return Question(kind, " ".join(words), answer)


def told(questions: Iterable[Question]) -> set[str]:
    """Words that hold for the picture: open answers, and words in questions that the answers do not deny."""
    words: set[str] = set()
    for question in questions:
        if question.answer != ("yes" if question.type == "negated" else "no"):
            words.update(question.text.split(), [question.answer])
    return words


def _index(names: Sequence[str], words: set[str]) -> int:
    """Index of the only name among the words, else `UNKNOWN`."""
    found = [index for index, name in enumerate(names) if name in words]
    return found[0] if len(found) == 1 else UNKNOWN


def load_pictures(split: Split) -> list[Picture]:
    """Read a split: the package's test pictures, or its training pictures with or without those set aside.

    Raises:
        SystemExit: the package is not installed.
    """
    package = _package()
    test = split == "test"
    paths = package.get_test_image_paths() if test else package.get_train_image_paths()
    records = package.get_test_questions() if test else package.get_train_questions()
    asked: dict[int, list[Question]] = defaultdict(list)
    for text, answer, number in zip(*records, strict=True):
        asked[number].append(to_question(text, answer))
    pictures = []
    for number in sorted(paths):
        if test or (number % DEVELOPMENT_EVERY == 0) == (split == "development"):
            words = told(asked[number])
            truth = _index(COLORS, words), _index(SHAPES, words)
            pictures.append(Picture(Path(paths[number]), tuple(asked[number]), *truth))
    return pictures


def foreground(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """[B, 256]: patches that differ from the background, the median of each channel; images [B, 128, 128, 3]."""
    # The shape covers a third of a picture at most, so that the median is the background.
    background = np.median(images, axis=(1, 2), keepdims=True).astype(np.int16)
    differs = np.abs(images.astype(np.int16) - background).sum(axis=3) > CONTRAST
    cover = differs.reshape(len(images), GRID, PATCH_SIZE, GRID, PATCH_SIZE).sum(axis=(2, 4))
    shown: NDArray[np.bool_] = cover.reshape(len(images), -1) >= MIN_COVER
    return shown


def to_labels(images: NDArray[np.uint8], pictures: Sequence[Picture]) -> Labels:
    """Derive what patches and pictures show; images [B, 128, 128, 3] of B pictures."""
    shown = foreground(images)
    color = np.array([[picture.color] for picture in pictures])
    shape = np.array([[picture.shape] for picture in pictures])
    return Labels(
        Attribute(COLORS, np.where(shown, color, NO_COLOR)),
        Attribute(SHAPE_WORDS, np.where(shown, shape, NO_SHAPE)),
        places(np.where(shown, _centre_cell(shown), PATCH_CELL)),
        (color, shape),
        shown,
    )


def _centre_cell(shown: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[B, 1]: the cell in which the middle of the foreground lies; 0 without any. shown [B, 256]."""
    number = np.maximum(shown.sum(1, keepdims=True), 1)
    row, column = ((shown * place).sum(1, keepdims=True) // number for place in divmod(np.arange(GRID**2), GRID))
    cell: NDArray[np.int64] = PATCH_CELL[row * GRID + column]
    return cell


class EasyVqaStream:
    """An endless seeded stream over a split's pictures, each seen once before any is seen again."""

    def __init__(self, split: Split, seed: int) -> None:
        """Open the stream.

        Args:
            split: which pictures.
            seed: order of pictures and choice of questions.

        Raises:
            SystemExit: the package is not installed.
        """
        self.pictures = load_pictures(split)
        self.choices = random.Random(seed)
        self.ahead: list[Picture] = []

    def lesson(self, pictures: int, questions: int) -> Lesson:
        """Draw `pictures` pictures and up to `questions` questions about each."""
        while len(self.ahead) < pictures:
            self.ahead += self.choices.sample(self.pictures, len(self.pictures))
        drawn, self.ahead = self.ahead[:pictures], self.ahead[pictures:]
        images = np.stack([picture.image() for picture in drawn])
        asked = [self.choices.sample(p.questions, min(questions, len(p.questions))) for p in drawn]
        return Lesson(images, asked, to_labels(images, drawn))


def heldout_items(count: int, seed: int) -> list[Item]:
    """Draw from the test split, kinds in rotation for as long as each has questions left.

    Args:
        count: how many questions; all there are if there are fewer.
        seed: order of the questions.

    Raises:
        SystemExit: the package is not installed.
    """
    pairs = [(picture, question) for picture in load_pictures("test") for question in picture.questions]
    random.Random(seed).shuffle(pairs)
    by_kind = [[pair for pair in pairs if pair[1].type == kind] for kind in KINDS]
    chosen = [pair for pair in chain.from_iterable(zip_longest(*by_kind)) if pair is not None][:count]
    images = {picture.path: picture.image() for picture, _ in chosen}
    shown = {path: foreground(image[None])[0] for path, image in images.items()}
    return [Item(images[picture.path], question, shown[picture.path]) for picture, question in chosen]
