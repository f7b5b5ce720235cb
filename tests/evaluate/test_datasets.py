"""Loaders on tiny files in the published layouts, built here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from data import ShapesStream
from PIL import Image

from qavp_export.errors import InputError, UnavailableError
from qavp_export.evaluate.datasets import DataSet, load_dataset

SHORT = "\nAnswer the question using a single word or phrase."


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)
    return path


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


def load(spec: str, images: Path | None = None, questions: int | None = None, seed: int = 0) -> DataSet:
    return load_dataset(spec, images, questions, seed)


def test_demo_is_the_held_out_stream() -> None:
    found = load("demo", questions=8, seed=3)
    expected = ShapesStream("heldout", 3).items(8)
    assert found.metric == "exact"
    assert [item.prompt for item in found.items] == [item.question.text for item in expected]
    assert [item.answers for item in found.items] == [(item.question.answer,) for item in expected]
    assert [item.kind for item in found.items] == [item.question.type for item in expected]
    for item, source in zip(found.items, expected, strict=True):
        assert isinstance(item.image, np.ndarray)
        np.testing.assert_array_equal(item.image, source.image)
        assert item.foreground is not None
        np.testing.assert_array_equal(item.foreground, source.foreground)


def test_scienceqa_layout(tmp_path: Path) -> None:
    problem = {
        "question": "Which is it?",
        "choices": ["a cat", "a dog"],
        "answer": 1,
        "hint": "Look.",
        "image": "image.png",
        "subject": "natural science",
    }
    problems = {"7": problem, "8": problem | {"image": None}, "9": problem | {"hint": "", "answer": 0}}
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"train": ["1"], "test": ["9", "7", "8"]})
    for name in ("7", "9"):
        picture(tmp_path / "images" / "test" / name / "image.png")
    found = load(f"scienceqa:{tmp_path}")
    assert found.metric == "choice"
    assert [item.id for item in found.items] == ["9", "7"]
    assert [item.answers for item in found.items] == [("A",), ("B",)]
    assert found.items[1].image == tmp_path / "images" / "test" / "7" / "image.png"
    assert found.items[1].kind == "natural science"
    assert found.items[1].choices == ("a cat", "a dog")
    assert found.items[1].prompt == (
        "Context: Look.\nWhich is it?\nA. a cat\nB. a dog\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_textvqa_layout(tmp_path: Path) -> None:
    answers = ["nokia"] * 9 + ["toshiba"]
    record = {"question": "what brand?", "image_id": "abc", "question_id": 34602, "answers": answers}
    path = write(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [record]})
    image = picture(tmp_path / "train_images" / "abc.jpg")
    for spec in (f"textvqa:{path}", f"textvqa:{tmp_path}"):
        (item,) = load(spec).items
        assert (item.id, item.image, item.prompt) == ("34602", image, "What brand?" + SHORT)
        assert item.answers == tuple(answers)
    assert load(f"textvqa:{path}").metric == "vqa"


def test_pope_layout(tmp_path: Path) -> None:
    first = {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    write_lines(tmp_path / "coco_pope_popular.json", first, first | {"question_id": 2, "label": "no"})
    write_lines(tmp_path / "coco_pope_random.json", first)
    picture(tmp_path / "coco" / "COCO_1.jpg")
    found = load(f"pope:{tmp_path}", images=tmp_path / "coco")
    assert found.metric == "yesno"
    assert [(item.id, item.kind, item.answers) for item in found.items] == [
        ("popular/1", "popular", ("yes",)),
        ("popular/2", "popular", ("no",)),
        ("random/1", "random", ("yes",)),
    ]
    assert found.items[0].prompt == "Is there a dog in the image?" + SHORT
    assert len(load(f"pope:{tmp_path / 'coco_pope_random.json'}", images=tmp_path / "coco").items) == 1


def test_gqa_layout(tmp_path: Path) -> None:
    records = {
        "201307251": {
            "imageId": "n161313",
            "question": "Is it overcast?",
            "answer": "no",
            "types": {"structural": "verify"},
        },
        "2": {"imageId": "n161313", "question": "Who is it?", "answer": "man"},
    }
    path = write(tmp_path / "testdev_balanced_questions.json", records)
    image = picture(tmp_path / "images" / "n161313.jpg")
    found = load(f"gqa:{path}")
    assert found.metric == "exact"
    assert [(item.id, item.image, item.kind) for item in found.items] == [
        ("201307251", image, "verify"),
        ("2", image, "all"),
    ]
    assert found.items[0].prompt == "Is it overcast?" + SHORT


@pytest.mark.parametrize(("spec", "split"), [("easy-vqa", "test"), ("easy-vqa:train", "train")])
def test_easy_vqa_package(spec: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's API, as its README has it.
    package = ModuleType("easy_vqa")
    path = str(picture(tmp_path / "5.png"))
    questions = (
        ["what color?", "is it a circle?", "what shape?", "is no circle there?"],
        ["teal", "no", "rectangle", "yes"],
        [5] * 4,
    )
    monkeypatch.setattr(package, f"get_{split}_questions", lambda: questions, raising=False)
    monkeypatch.setattr(package, f"get_{split}_image_paths", lambda: {5: path}, raising=False)
    monkeypatch.setitem(sys.modules, "easy_vqa", package)
    found = load(spec)
    assert found.name == spec
    assert [(item.answers, item.kind) for item in found.items] == [
        (("teal",), "color"),
        (("no",), "yesno"),
        (("rectangle",), "shape"),
        (("yes",), "negated"),
    ]
    assert found.items[0].image == Path(path)


def test_easy_vqa_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UnavailableError, match="pip install easy-vqa"):
        load("easy-vqa")


def test_easy_vqa_split_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="no split 'dev'; choose from test, train"):
        load("easy-vqa:dev")


def test_jsonl_of_every_kind(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    exact = write_lines(
        tmp_path / "exact.jsonl",
        {"image": "a.png", "question": "What?", "answer": "red", "type": "color", "id": 9},
        {"question": "Why?", "answers": ["so", "because"]},
    )
    found = load(f"jsonl:{exact}")
    assert (found.name, found.metric) == ("exact.jsonl", "exact")
    assert [(item.id, item.image, item.prompt, item.answers, item.kind) for item in found.items] == [
        ("9", image, "What?", ("red",), "color"),
        ("1", None, "Why?", ("so", "because"), "all"),
    ]
    people = write_lines(tmp_path / "vqa.jsonl", {"question": "What?", "answers": ["red"] * 10})
    assert load(f"jsonl:{people}").metric == "vqa"
    choice = {"question": "Which?", "choices": ["a cat", "a dog"]}
    path = write_lines(tmp_path / "choice.jsonl", *(choice | {"answer": answer} for answer in ("a dog", "A", 1)))
    chosen = load(f"jsonl:{path}")
    assert chosen.metric == "choice"
    assert [item.answers for item in chosen.items] == [("B",), ("A",), ("B",)]
    assert chosen.items[0].prompt.startswith("Which?\nA. a cat\nB. a dog\n")


def test_a_draw_is_repeatable_and_keeps_the_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", *({"question": f"q{i}", "answer": "a"} for i in range(50)))
    drawn = [item.id for item in load(f"jsonl:{path}", questions=9, seed=1).items]
    assert len(set(drawn)) == 9
    assert drawn == sorted(drawn, key=int)
    assert drawn == [item.id for item in load(f"jsonl:{path}", questions=9, seed=1).items]
    assert drawn != [item.id for item in load(f"jsonl:{path}", questions=9, seed=2).items]
    assert len(load(f"jsonl:{path}", questions=99).items) == 50


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 1 is not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"answer": "a"}', "question must be text"),
        ('{"question": "q"}', "either answer or answers"),
        ('{"question": "q", "answer": "a", "answers": ["a"]}', "either answer or answers"),
        ('{"question": "q", "answers": []}', "answers must be a list"),
        ('{"question": "q", "choices": ["a"], "answer": "z"}', "answer must be one of the choices"),
        ('{"question": "q", "choices": ["a"], "answer": 1}', "answer must be one of the choices"),
        ('{"question": "q", "choices": [], "answer": 1}', "choices must be a list"),
        ('{"question": "q", "choices": ["a"], "answer": 0}\n{"question": "q", "answer": "a"}', "split the file"),
        ('{"question": "q", "answer": "a", "image": "../out.png"}', "leads out of"),
        ('{"question": "q", "answer": "a", "image": "none.png"}', "does not exist"),
        ('{"question": "q", "answer": "a", "image": "a\\u0000b"}', "no usable file name|does not exist"),
        ("", "holds no question"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, line: str, match: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    picture(tmp_path / "out.png")
    (folder / "q.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(InputError, match=match):
        load(f"jsonl:{folder / 'q.jsonl'}")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("imagenet", "does not exist; choose from demo"),
        ("jsonl", "needs a .jsonl file"),
        ("jsonl:none.jsonl", "none.jsonl does not exist"),
        ("textvqa:{other}", "not in TextVQA's layout"),
        ("gqa:{other}", "not in GQA's layout"),
        ("scienceqa:{folder}", "problems.json cannot be read"),
        ("pope:{other}", "must be text"),
        ("pope:{folder}", "has no coco_pope_"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, spec: str, match: str) -> None:
    other = write(tmp_path / "other.json", {"a": [1]})
    with pytest.raises(InputError, match=match):
        load(spec.format(other=other, folder=tmp_path))


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--questions is 0"):
        load("demo", questions=0)
    with pytest.raises(InputError, match="is not a folder"):
        load("demo", images=tmp_path / "none")
