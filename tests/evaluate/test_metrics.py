"""Judges of answers: the published rules, worked out by hand."""

from __future__ import annotations

import pytest

from qavp_export.evaluate.datasets import Item
from qavp_export.evaluate.metrics import METRICS, read_choice
from qavp_export.evaluate.vqa_text import normalize


def item(*answers: str, choices: tuple[str, ...] = ()) -> Item:
    return Item("0", None, "q", answers, choices=choices)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        # What `EvalAIAnswerProcessor` of facebookresearch/mmf returns.
        ("The  Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("end.", "end"),
        ("red-blue", "red blue"),
        ("red - blue", "red blue"),
        ("John's", "john 's"),
        ("dont know", "don't know"),
        ("a/b", "b"),
        ("yes!\n", "yes"),
        ("(5)", "5"),
    ],
)
def test_normalisation(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


def test_vqa_accuracy_of_ten_annotators() -> None:
    judge = METRICS["vqa"]
    people = item(*["red"] * 2, *["dark red"] * 7, "blue")
    # 2 of 10 agree: for those two one other does (1/3), for the other eight two do (2/3).
    assert judge("Red.", people) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)  # float sums
    assert judge("the dark red", people) == 1
    # One agrees: none of the others for that one, one for the nine.
    assert judge("blue", people) == pytest.approx(0.3)
    assert judge("green", people) == 0
    # 3 of 10: 2/3 for three, 1 for seven.
    assert judge("one", item(*["1"] * 3, *["2"] * 7)) == pytest.approx(0.9)


def test_fewer_answers_than_ten_are_alternatives() -> None:
    assert METRICS["vqa"]("The sofa", item("couch", "sofa")) == 1
    assert METRICS["vqa"]("chair", item("couch", "sofa")) == 0


def test_exact_match() -> None:
    judge = METRICS["exact"]
    assert judge("Upper  left.", item("top", "upper left")) == 1
    assert judge("the upper left", item("upper left")) == 0
    assert judge("", item("red")) == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B) ", "B"),
        ("B. a dog", "B"),
        ("B: dog", "B"),
        ("The answer is B.", "B"),
        ("After some thought, the answer is: (C)", "C"),
        ("a dog.", "B"),
        ("A cat", "A"),
        ("A dog chases a cat", ""),
        ("Because", ""),
        ("D", ""),
        ("", ""),
    ],
)
def test_reading_a_choice(answer: str, letter: str) -> None:
    assert read_choice(answer, ("a cat", "a dog", "none of the above")) == letter


def test_multiple_choice() -> None:
    question = item("B", choices=("a cat", "a dog"))
    assert [METRICS["choice"](answer, question) for answer in ("B.", "a dog", "A", "no idea")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("No, there is none.", "no"),
        ("There is not", "no"),
        ("Yes. No wait", "yes"),
        ("Nobody", "yes"),  # by POPE's rule everything but no and not is yes
    ],
)
def test_yes_or_no(answer: str, read: str) -> None:
    assert METRICS["yesno"](answer, item(read)) == 1
    assert METRICS["yesno"](answer, item({"yes": "no", "no": "yes"}[read])) == 0
