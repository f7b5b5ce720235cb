"""The selection cost benchmark: what it runs, and what its table says."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from selection_cost import _tokens, alternate, selection, table

from qavp_export.engines import EngineOptions
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import Select, select_tokens
from qavp_export.numerics.semantic import random_relevance


@pytest.mark.parametrize("select", ["topk", "dpp", "maxmin"])
def test_what_is_timed_selects(select: Select) -> None:
    outputs: Any = selection(select, tokens=30, width=64, kept=7, options=EngineOptions(threads=1))()
    features = _tokens(30, 64)
    score = hybrid_token_score(features, random_relevance(0, 30)[np.newaxis], group_size=64)
    np.testing.assert_array_equal(outputs[1], select_tokens(select, features, score, 7))
    np.testing.assert_array_equal(outputs[0], np.take_along_axis(features, outputs[1][..., np.newaxis], axis=1))


def test_runs_take_turns_and_the_first_turn_does_not_count() -> None:
    calls: list[str] = []
    figures = alternate({name: lambda name=name: calls.append(name) for name in ("a", "b")}, repeats=2)  # type: ignore[misc]
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in figures.values()] == [2, 2]


def test_the_table_tells_the_share_of_each_stage() -> None:
    runs = {"vision w8a8": [90.0, 100.0, 400.0], "vision fp32": [200.0], "dpp": [1.0, 2.0, 9.0]}
    console = Console(file=io.StringIO(), width=100)
    console.print(table({"576 x 4096 -> 72": runs}))
    last = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert last.split() == ["576", "x", "4096", "->", "72", "score", "and", "dpp", "2.0", "2.0", "1.0"]
