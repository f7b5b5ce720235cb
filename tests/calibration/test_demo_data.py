"""The demo's pictures as calibration data."""

from __future__ import annotations

import json
from pathlib import Path

from qavp_export.calibration import demo_calibration

SAMPLES = Path(__file__).parents[2] / "examples" / "shapes_vqa" / "samples"
ALL = 1000


def test_every_question_about_every_picture_is_an_item() -> None:
    lines = (SAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    drawn = demo_calibration(ALL, seed=0)
    read = sorted((item.images[0].name, item.prompt, item.answer) for item in drawn.items)
    records = map(json.loads, lines)
    assert read == sorted((record["image"], record["question"], record["answer"]) for record in records)
    assert len(read) == 72
    assert drawn.name == "shapes_vqa"


def test_the_shipped_pictures_are_those_of_the_example() -> None:
    for item in demo_calibration(ALL, seed=0).items:
        assert item.images[0].read_bytes() == (SAMPLES / item.images[0].name).read_bytes()


def test_a_seed_draws_the_same_items_and_another_one_draws_others() -> None:
    assert demo_calibration(9, seed=3) == demo_calibration(9, seed=3)
    # Equal draws of 9 of 72 in order have probability 64! / 72! = 2.4e-16.
    prompts = [[item.prompt for item in demo_calibration(9, seed=seed).items] for seed in (3, 4)]
    assert prompts[0] != prompts[1]
