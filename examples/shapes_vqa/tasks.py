"""The tasks that the scripts can train and measure, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import data
import easy_vqa_data
from lessons import CELLS, Item, Lesson, Stream
from processing import Vocabulary
from rendering import NO_COLOR, NO_DIGIT, NO_SHAPE

QUESTIONS = 12  # per picture and lesson
DEV_SEED, DEV_IMAGES = 101, 96


@dataclass(frozen=True)
class Stage:
    """One stage of a schedule.

    Attributes:
        name: for logs and files.
        steps: optimizer steps.
        batch: images per step.
        rate: peak learning rate.
        final: learning rate at the end, as a share of the peak.
        decoder: whether the decoder takes part.
        keep: projected tokens that the decoder sees, of 256.
    """

    name: str
    steps: int
    batch: int
    rate: float
    final: float
    decoder: bool = True
    keep: int = 256


@dataclass(frozen=True)
class Task:
    """What a model is trained and measured on.

    Attributes:
        vocabulary: the model's words.
        gate: accuracy required of each question type, in the order of tables.
        schedule: stages of training.
        train: opens the training stream of a seed.
        development: draws pictures that are neither trained on nor measured with at the end.
        heldout: draws questions for the final measurement, from their number and a seed.
        cells: how many places [CLS] must describe.
        classes: what it must say about each: the number of classes of each attribute.
    """

    vocabulary: Vocabulary
    gate: dict[str, float]
    schedule: tuple[Stage, ...]
    train: Callable[[int], Stream]
    development: Callable[[], Lesson]
    heldout: Callable[[int, int], list[Item]]
    cells: int
    classes: tuple[int, ...]

    @property
    def types(self) -> tuple[str, ...]:
        """The question types."""
        return tuple(self.gate)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(stage.steps for stage in self.schedule)


TASKS = {
    "shapes": Task(
        vocabulary=data.VOCABULARY,
        gate={"color": 0.9, "shape": 0.9, "yesno": 0.9, "position": 0.9, "count": 0.8, "digit": 0.9},
        schedule=(
            Stage("align", 1300, 32, 2e-3, 0.1, decoder=False),
            Stage("lookup", 900, 16, 1e-3, 0.5, keep=64),
            Stage("full", 1000, 16, 6e-4, 0.0),
        ),
        train=lambda seed: data.ShapesStream("train", seed),
        development=lambda: data.ShapesStream("heldout", DEV_SEED).lesson(DEV_IMAGES, QUESTIONS),
        heldout=lambda count, seed: data.ShapesStream("heldout", seed).items(count),
        cells=CELLS,
        classes=(NO_COLOR + 1, NO_SHAPE + 1, NO_DIGIT + 1),
    ),
    "easy-vqa": Task(
        vocabulary=easy_vqa_data.VOCABULARY,
        gate={"color": 0.95, "shape": 0.95, "yesno": 0.95, "negated": 0.95},
        # One object per picture: tokens learn to name it in a small part of the pictures that scenes take.
        schedule=(
            Stage("align", 200, 16, 2e-3, 0.1, decoder=False),
            Stage("lookup", 600, 8, 1e-3, 0.5, keep=96),
            Stage("full", 500, 8, 8e-4, 0.0),
            # Whether the one shape is the one asked for comes late: a second pass from a high rate.
            Stage("again", 400, 8, 8e-4, 0.0),
        ),
        train=lambda seed: easy_vqa_data.EasyVqaStream("train", seed),
        development=lambda: easy_vqa_data.EasyVqaStream("development", DEV_SEED).lesson(DEV_IMAGES, QUESTIONS),
        heldout=easy_vqa_data.heldout_items,
        cells=1,
        classes=easy_vqa_data.SCENE_CLASSES,
    ),
}
