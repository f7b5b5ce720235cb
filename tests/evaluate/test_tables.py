"""The table says what the report says, from the baseline's side."""

from __future__ import annotations

from typing import Any

import pytest

from qavp_export.evaluate.tables import print_report


def arm(accuracy: float, after: int | None, seeds: int = 1) -> dict[str, Any]:
    kinds = {kind: {"questions": 2, "accuracy": accuracy, "interval_95": [0, 1]} for kind in ("color", "count")}
    return {
        "accuracy": accuracy,
        "interval_95": [accuracy - 0.1, accuracy + 0.1],
        "by_type": kinds,
        "seeds": seeds,
        "vision_tokens": {"before": 256, "after": after},
        "recipe": {"keep": 0.125},
    }


def pair(a: str, b: str, difference: float, interval: list[float], p: float | None) -> dict[str, Any]:
    test = None if p is None else {"only_a": 0, "only_b": 1, "p": p}
    return {"a": a, "b": b, "difference": difference, "interval_95": interval, "mcnemar": test}


def test_differences_are_from_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "data": {"name": "demo", "metric": "exact", "questions": 4},
        "fidelity": None,
        "arms": {"full": arm(0.9, 256), "w4a4": arm(0.9, 32), "random": arm(0.5, None, 5)},
        "comparisons": [
            pair("w4a4", "full", 0.0, [0.0, 0.0], 1.0),
            pair("random", "full", -0.4, [-0.6, -0.1], None),
            pair("random", "w4a4", -0.4, [-0.6, -0.1], 1e-5),
        ],
    }
    print_report(report, "w4a4")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["full", "256", "90.0", "[80.0,", "100.0]", "+0.0", "[+0.0,", "+0.0]", "1.0000"] in lines
    assert ["w4a4", "32", "90.0", "[80.0,", "100.0]"] in lines
    random = "random, 5 seeds 0.125 of all 50.0 [40.0, 60.0] -40.0 [-60.0, -10.0] <0.0001"
    assert random.split() in lines
    report["comparisons"] = [pair("w4a4", "random", 0.4, [0.1, 0.6], 0.25)]
    print_report(report, "w4a4")
    assert "-40.0 [-60.0, -10.0] 0.2500" in " ".join(capsys.readouterr().out.split())
