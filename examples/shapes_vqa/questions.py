"""Questions about a scene. Each has exactly one right answer, or is not asked."""

import random
from collections import Counter
from collections.abc import Callable
from typing import get_args

from lessons import Question
from scenes import COLORS, DIGITS, PLURALS, SHAPES, QuestionType, Scene, cell_words

HARD_NEGATIVE = 0.8  # share of "no" questions that name a colour and a shape that are both in the picture


def ask_color(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the colour of a shape that occurs once."""
    counts = Counter(thing.shape for thing in scene.things)
    single = [thing for thing in scene.things if counts[thing.shape] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return Question("color", f"what color is the {SHAPES[thing.shape]} ?", COLORS[thing.color])


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the shape of the object whose colour occurs once."""
    counts = Counter(thing.color for thing in scene.things)
    single = [thing for thing in scene.things if counts[thing.color] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return Question("shape", f"what shape is the {COLORS[thing.color]} object ?", SHAPES[thing.shape])


def ask_yesno(scene: Scene, rng: random.Random) -> Question | None:
    """Ask whether a coloured shape is there; half the answers are no, most of those hard."""
    present = {(thing.color, thing.shape) for thing in scene.things}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(present))
        answer = "yes"
    else:
        colors, shapes = sorted({c for c, _ in present}), sorted({s for _, s in present})
        absent = [(c, s) for c in colors for s in shapes if (c, s) not in present]
        if not absent or rng.random() > HARD_NEGATIVE:
            absent = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES)) if (c, s) not in present]
        color, shape = rng.choice(absent)
        answer = "no"
    article = "an" if COLORS[color] == "orange" else "a"
    return Question("yesno", f"is there {article} {COLORS[color]} {SHAPES[shape]} ?", answer)


def ask_position(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the cell of an object named by colour, by shape or by both, or of the digit."""
    if rng.random() < 0.1:
        return Question("position", "where is the digit ?", cell_words(scene.plate.cell))
    forms: list[tuple[str, int]] = []
    for thing in scene.things:
        color, shape = COLORS[thing.color], SHAPES[thing.shape]
        if sum(other.color == thing.color for other in scene.things) == 1:
            forms.append((f"{color} object", thing.cell))
        if sum(other.shape == thing.shape for other in scene.things) == 1:
            forms.append((shape, thing.cell))
        if sum((other.color, other.shape) == (thing.color, thing.shape) for other in scene.things) == 1:
            forms.append((f"{color} {shape}", thing.cell))
    if not forms:
        return None
    name, cell = rng.choice(forms)
    return Question("position", f"where is the {name} ?", cell_words(cell))


def ask_count(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the number of shapes: all, of one kind, or of one colour (the plate is not a shape)."""
    if rng.random() < 0.15:
        return Question("count", "how many shapes are there ?", str(len(scene.things)))
    thing = rng.choice(scene.things)  # by object, so that larger counts are asked for more often
    absent = rng.random() < 0.12
    if rng.random() < 0.5:
        used = {other.shape for other in scene.things}
        free = [index for index in range(len(SHAPES)) if index not in used]
        shape = rng.choice(free) if absent and free else thing.shape
        count = sum(other.shape == shape for other in scene.things)
        return Question("count", f"how many {PLURALS[shape]} are there ?", str(count))
    unused = sorted(set(range(len(COLORS))) - {other.color for other in scene.things})
    color = rng.choice(unused) if absent and unused else thing.color
    count = sum(other.color == color for other in scene.things)
    return Question("count", f"how many {COLORS[color]} objects are there ?", str(count))


def ask_digit(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the digit on the plate."""
    del rng  # every scene has one plate and there is one way to ask
    return Question("digit", "what digit is shown ?", DIGITS[scene.plate.digit])


_ASKERS: dict[QuestionType, Callable[[Scene, random.Random], Question | None]] = {
    "color": ask_color,
    "shape": ask_shape,
    "yesno": ask_yesno,
    "position": ask_position,
    "count": ask_count,
    "digit": ask_digit,
}


def ask(scene: Scene, kind: QuestionType, rng: random.Random) -> Question | None:
    """Ask one question of a type.

    Args:
        scene: the scene.
        kind: question type.
        rng: source of the choices.

    Returns:
        The question, or None if the scene has no unambiguous question of this type.
    """
    return _ASKERS[kind](scene, rng)


def ask_all(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Ask up to `count` different questions, types in rotation; questions already asked are passed over."""
    kinds: tuple[QuestionType, ...] = get_args(QuestionType)
    questions: dict[Question, None] = {}
    for turn in range(3 * count):
        question = ask(scene, kinds[turn % len(kinds)], rng)
        if question is not None:
            questions[question] = None
        if len(questions) == count:
            break
    return list(questions)
