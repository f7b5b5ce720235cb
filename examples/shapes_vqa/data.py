"""Procedural visual question answering: coloured shapes and one digit plate on a noise texture.

A scene is drawn on a 3 x 3 grid of cells, at most one object in a cell, each object wholly inside its cell,
so that every question has exactly one right answer. Everything follows from `(split, seed)`: the two splits
use different random streams, and nothing is stored. Sizes are in pixels of a 128 x 128 image.

Run as a script it writes sample pictures and their questions:

    python examples/shapes_vqa/data.py --out examples/shapes_vqa/samples --images 12 --seed 0
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from lessons import BACKGROUND, CELLS, COLUMNS, ROWS, Attribute, Item, Labels, Lesson, Question, places
from numpy.typing import NDArray
from PIL import Image
from processing import Vocabulary
from questions import ask, ask_all
from rendering import PatchLabels, render
from scenes import (
    COLORS,
    DIGITS,
    MAX_SHAPES,
    MIN_SHAPES,
    PLURALS,
    RADIUS,
    SHAPES,
    Plate,
    QuestionType,
    Scene,
    Thing,
)

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)
TYPES: tuple[QuestionType, ...] = get_args(QuestionType)

GRAMMAR = "? what color shape is the object objects there an a where how many shapes are digit shown yes no"
VOCABULARY = Vocabulary(
    (*GRAMMAR.split(), *COLORS, *SHAPES, *PLURALS, *ROWS, *COLUMNS, *DIGITS, BACKGROUND),
    tuple(zip(SHAPES, PLURALS, strict=True)),
)
SHAPE_WORDS = (*SHAPES, "digit", BACKGROUND)  # in the order of the labels
SHAPE_WEIGHT = 3.0  # by far the hardest attribute: colours and places are right after 100 steps

CELL_SIZE = 128 / 3
ANGLE = 0.2  # largest rotation in radians: small, so that a square never looks like a diamond
THEME_PROBABILITY = 0.5  # share of scenes in which several objects have a colour or a shape in common


@dataclass(frozen=True)
class Batch:
    """Rendered scenes.

    Attributes:
        scenes: the B scene descriptions.
        images: [B, 128, 128, 3], uint8.
        labels: what each of the 256 patches of each image shows.
    """

    scenes: list[Scene]
    images: NDArray[np.uint8]
    labels: PatchLabels


def to_labels(labels: PatchLabels) -> Labels:
    """Put the renderer's labels into the words that tokens must name."""
    return Labels(
        Attribute(COLORS, labels.color),
        Attribute(SHAPE_WORDS, labels.shape, SHAPE_WEIGHT),
        (Attribute(DIGITS, labels.digit), *places(labels.cell)),
        (labels.cell_color, labels.cell_shape, labels.cell_digit),
        labels.foreground,
    )


class ShapesStream:
    """An endless seeded stream of scenes, pictures and questions."""

    def __init__(self, split: Split, seed: int) -> None:
        """Open the stream.

        Args:
            split: `train` or `heldout`; the same seed gives unrelated streams for the two.
            seed: any non-negative integer.

        Raises:
            ValueError: the split is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}")
        sequence = np.random.SeedSequence([seed, SPLITS.index(split)])
        self.pixels = np.random.default_rng(sequence)
        # Symbolic choices come one at a time: for single draws the standard library is ten times faster.
        self.choices = random.Random(int.from_bytes(sequence.generate_state(4).tobytes(), "little"))

    def scene(self) -> Scene:
        """Draw one scene description."""
        rng = self.choices
        count = rng.randint(MIN_SHAPES, MAX_SHAPES)
        cells = rng.sample(range(CELLS), count + 1)
        looks = [(rng.randrange(len(COLORS)), rng.randrange(len(SHAPES))) for _ in range(count)]
        if rng.random() < THEME_PROBABILITY:
            color, shape = looks[0]
            by_color = rng.random() < 0.5
            for index in range(1, rng.randint(2, count)):
                looks[index] = (color, looks[index][1]) if by_color else (looks[index][0], shape)
        things = []
        for (color, shape), cell in zip(looks, cells[1:], strict=True):
            radius = rng.uniform(*RADIUS)
            x, y = self._centre(cell, 1.1 * radius, 1.1 * radius)
            things.append(Thing(color, shape, cell, x, y, radius, rng.uniform(-ANGLE, ANGLE)))
        x, y = self._centre(cells[0], 9.0, 11.0)
        return Scene(tuple(things), Plate(rng.randrange(10), cells[0], x, y, rng.random() < 0.5))

    def _centre(self, cell: int, half_width: float, half_height: float) -> tuple[float, float]:
        """Draw the centre of an object that must lie inside its cell with a pixel to spare."""
        row, column = divmod(cell, 3)
        slack_x, slack_y = CELL_SIZE / 2 - half_width - 1, CELL_SIZE / 2 - half_height - 1
        x = (column + 0.5) * CELL_SIZE + self.choices.uniform(-slack_x, slack_x)
        y = (row + 0.5) * CELL_SIZE + self.choices.uniform(-slack_y, slack_y)
        return x, y

    def batch(self, size: int) -> Batch:
        """Draw and render `size` scenes."""
        scenes = [self.scene() for _ in range(size)]
        images, labels = render(scenes, self.pixels)
        return Batch(scenes, images, labels)

    def questions(self, scene: Scene, count: int) -> list[Question]:
        """Draw `count` questions about a scene, the types as evenly as the scene allows."""
        return ask_all(scene, count, self.choices)

    def lesson(self, pictures: int, questions: int) -> Lesson:
        """Draw and render `pictures` scenes, and up to `questions` questions about each."""
        batch = self.batch(pictures)
        asked = [self.questions(scene, questions) for scene in batch.scenes]
        return Lesson(batch.images, asked, to_labels(batch.labels))

    def items(self, count: int, types: Sequence[QuestionType] = TYPES) -> list[Item]:
        """Draw questions that each have a picture of their own, types in rotation.

        Args:
            count: number of questions (and of pictures).
            types: question types to rotate through.

        Returns:
            `count` items; item i has type `types[i % len(types)]`.
        """
        scenes: list[Scene] = []
        questions: list[Question] = []
        while len(questions) < count:
            scene = self.scene()
            question = ask(scene, types[len(questions) % len(types)], self.choices)
            if question is not None:
                scenes.append(scene)
                questions.append(question)
        items: list[Item] = []
        for start in range(0, count, 64):
            part = scenes[start : start + 64]
            images, labels = render(part, self.pixels)
            foreground = labels.foreground
            items += [Item(images[i], questions[start + i], foreground[i]) for i in range(len(part))]
        return items


def write_samples(out: Path, images: int, seed: int) -> int:
    """Write held-out pictures as PNG and their questions as `questions.jsonl`.

    Args:
        out: folder to create.
        images: number of pictures; a scene that cannot carry all six types is skipped.
        seed: seed of the held-out stream.

    Returns:
        The number of questions written.
    """
    out.mkdir(parents=True, exist_ok=True)
    stream = ShapesStream("heldout", seed)
    lines: list[str] = []
    written = 0
    while written < images:
        batch = stream.batch(1)
        asked = [ask(batch.scenes[0], kind, stream.choices) for kind in TYPES]
        questions = [question for question in asked if question is not None]
        if len(questions) < len(TYPES):
            continue
        name = f"{written:02d}.png"
        Image.fromarray(batch.images[0]).save(out / name, optimize=True)
        for question in questions:
            record = {
                "image": name,
                "type": question.type,
                "question": question.text,
                "answer": question.answer,
            }
            lines.append(json.dumps(record))
        written += 1
    (out / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    """Command line: write sample pictures and questions."""
    parser = argparse.ArgumentParser(description="Write held-out sample pictures and their questions.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--images", type=int, default=12, help="number of pictures (six questions each)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out stream")
    args = parser.parse_args()
    count = write_samples(args.out, args.images, args.seed)
    print(f"{args.images} pictures and {count} questions in {args.out}")


if __name__ == "__main__":
    main()
