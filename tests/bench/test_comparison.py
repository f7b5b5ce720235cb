"""The order of measuring, and contestants that are not there or break."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from qavp_export.bench.comparison import Plan, compare, turn
from qavp_export.errors import BundleError, InputError, QavpError, UnavailableError
from tests.bench.made_up import MadeUp, entries, requests


def silent(_stage: str, _done: int, _total: int) -> None:
    pass


def test_every_contestant_comes_at_every_place_and_in_both_directions() -> None:
    rounds = [turn(number, 3) for number in range(6)]
    assert sorted(rounds) == sorted(map(list, itertools.permutations(range(3))))
    assert [turn(number, 3) for number in range(6, 12)] == rounds
    assert turn(5, 1) == [0]
    assert [sorted(turn(number, 4)) for number in range(8)] == [[0, 1, 2, 3]] * 8


def test_rounds_are_interleaved_and_warm_up_does_not_count(bundle: Path) -> None:
    log: list[tuple[str, str]] = []
    opened: list[MadeUp] = []

    def opener(entry):
        opened.append(MadeUp(entry, log))
        return opened[-1]

    plan = Plan(entries(bundle, "a", "b"), requests(2), warmup=3, repeats=4)
    comparison = compare(plan, opener, silent)
    q0, q1, q2 = "question 0", "question 1", "question 0"
    warm = [("a", q0), ("a", q1), ("a", q2), ("a", "device memory")]
    assert log[:4] == warm
    assert log[4:8] == [("b", text) for _, text in warm]
    measured = [("a", q0), ("b", q0), ("b", q1), ("a", q1), ("b", q0), ("a", q0), ("a", q1), ("b", q1)]
    assert log[8:] == measured
    for found in comparison.measured:
        # Runs 4 to 7 of each: the first three do not count.
        assert [sample.preprocess for sample in found.samples] == pytest.approx([0.004, 0.005, 0.006, 0.007], rel=1e-12)
        assert (found.host_peak_bytes, found.device_peak_bytes) == (2_000_000, None)
        assert found.bundle_bytes == sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        assert found.load is None
    assert [contestant.open for contestant in opened] == [False, False]


def test_every_image_is_shown_before_it_counts(bundle: Path) -> None:
    log: list[tuple[str, str]] = []
    compare(Plan(entries(bundle, "a"), requests(3), 1, 2), lambda entry: MadeUp(entry, log), silent)
    assert [text for _, text in log[:4]] == ["question 0", "question 1", "question 2", "device memory"]


def test_engines_that_are_not_available_are_listed_with_the_reason(bundle: Path) -> None:
    def opener(entry):
        if entry.engine == "ort-cuda":
            raise UnavailableError("no NVIDIA driver")
        if entry.engine == "tensorrt-rtx":
            raise BundleError("no such engine")
        return MadeUp(entry, [])

    plan = Plan(entries(bundle, "ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"), requests(1), 1, 2)
    comparison = compare(plan, opener, silent)
    assert [found.entry.engine for found in comparison.measured] == ["ort-cpu", "tensorrt"]
    assert [(gone.entry.engine, gone.reason, gone.failed) for gone in comparison.missing] == [
        ("ort-cuda", "no NVIDIA driver", False),
        ("tensorrt-rtx", "no such engine", False),
    ]
    cpu, tensorrt = comparison.measured
    assert cpu.scoring == ([0.005, 0.005], [0.003, 0.003])
    assert (tensorrt.scoring, tensorrt.scoring_reason) == (None, "one serialized engine")


# Run 1 warms up; run 3 is in the second round.
@pytest.mark.parametrize("fails_at", [1, 3])
def test_one_that_breaks_goes_and_the_others_go_on(bundle: Path, fails_at: int) -> None:
    def opener(entry):
        return MadeUp(entry, [], fails_at=fails_at if entry.engine == "b" else 0)

    plan = Plan(entries(bundle, "a", "b", "c"), requests(1), 1, 5, clients=2, duration=4.0)
    comparison = compare(plan, opener, silent)
    assert [found.entry.engine for found in comparison.measured] == ["a", "c"]
    assert all(len(found.samples) == 5 for found in comparison.measured)
    assert all(found.load is not None and found.load.clients == 2 for found in comparison.measured)
    (gone,) = comparison.missing
    assert (gone.entry.engine, gone.reason, gone.failed) == ("b", "its process was killed", True)


def test_one_that_cannot_start_for_another_reason_has_failed(bundle: Path) -> None:
    def opener(_entry):
        raise QavpError("out of memory")

    comparison = compare(Plan(entries(bundle, "a"), requests(1), 1, 2), opener, silent)
    assert comparison.measured == ()
    assert [gone.failed for gone in comparison.missing] == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": ()}, "nothing to compare"),
        ({"requests": ()}, "nothing to ask"),
        ({"repeats": 1}, "--repeats 2 or more"),
        ({"warmup": 0}, "--warmup is 1 or more"),
        ({"clients": -1}, "--load is 1 or more"),
        ({"clients": 2, "duration": 0.0}, "--duration more than 0"),
    ],
)
def test_a_plan_out_of_range_is_refused_before_anything_is_opened(bundle: Path, changes: dict, message: str) -> None:
    fields = {"entries": entries(bundle, "a"), "requests": requests(1), "warmup": 1, "repeats": 2, **changes}

    def opener(_entry):
        raise AssertionError("opened")

    with pytest.raises(InputError, match=message):
        compare(Plan(**fields), opener, silent)


def test_the_same_contestant_twice_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match="tiny a is there twice"):
        Plan(entries(bundle, "a", "a"), requests(1), 1, 2).check()
