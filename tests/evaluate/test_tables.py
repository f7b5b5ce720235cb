"""The table says what the report says, from the baseline's side."""

from __future__ import annotations

from typing import Any

import pytest

from qavp_export.evaluate.tables import print_report


def arm(accuracy: float, after: int | None, seeds: int = 1, kept: float | None = None) -> dict[str, Any]:
    kinds = {kind: {"questions": 2, "accuracy": accuracy, "interval_95": [0, 1]} for kind in ("color", "count")}
    return {
        "accuracy": accuracy,
        "interval_95": [accuracy - 0.1, accuracy + 0.1],
        "by_type": kinds,
        "seeds": seeds,
        "vision_tokens": {"before": 256, "after": after},
        "foreground_kept": kept,
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


def test_the_foreground_that_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "data": {"name": "demo", "metric": "exact", "questions": 4},
        "fidelity": None,
        "arms": {"full": arm(0.9, 256, kept=1.0), "w4a4": arm(0.9, 32, kept=0.734)},
        "comparisons": [pair("w4a4", "full", 0.0, [0.0, 0.0], 1.0)],
    }
    print_report(report, "full")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["full", "256", "90.0", "[80.0,", "100.0]", "100"] in lines
    assert ["w4a4", "32", "90.0", "[80.0,", "100.0]", "+0.0", "[+0.0,", "+0.0]", "1.0000", "73"] in lines


def fidelity(kl: float, agreement: float) -> dict[str, Any]:
    found = {"kl": kl, "kl_interval_95": [kl - 0.5, kl + 0.5], "top1_agreement": agreement}
    return {"fidelity": found | {"top1_agreement_interval_95": [agreement - 0.1, agreement + 0.1]}}


def test_divergences_are_compared_with_a_baseline_that_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    kl = {"difference": -0.25, "interval_95": [-0.5, 0.125]}
    report = {
        "data": None,
        "fidelity": {"prompts": 4, "reference": "full"},
        "arms": {"w4a4": fidelity(1, 0.5), "dpp": fidelity(0.75, 0.6)},
        "comparisons": [],
        "fidelity_comparisons": [{"a": "dpp", "b": "w4a4", "kl": kl, "top1_agreement": kl}],
    }
    print_report(report, "full")
    out = capsys.readouterr().out
    assert "less" not in out
    assert "dpp 0.7500 [0.2500, 1.2500] 60.0 [50.0, 70.0]" in " ".join(out.split())
    print_report(report, "w4a4")
    out = capsys.readouterr().out
    assert "KL less w4a4 [95%] same top-1 in % [95%]" in " ".join(out.split())
    assert "dpp 0.7500 [0.2500, 1.2500] -0.2500 [-0.5000, +0.1250] 60.0" in " ".join(out.split())
    print_report(report, "dpp")
    assert "w4a4 1.0000 [0.5000, 1.5000] +0.2500 [-0.1250, +0.5000] 50.0" in " ".join(capsys.readouterr().out.split())
