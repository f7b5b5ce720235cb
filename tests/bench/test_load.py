"""Concurrent clients, without a model."""

from __future__ import annotations

import itertools
import threading

import pytest

from qavp_export.bench.load import run_load
from qavp_export.bench.request import Request, Sample
from qavp_export.errors import InputError, QavpError
from tests.bench.made_up import requests, sample


def test_clients_are_served_at_once_and_each_begins_at_another_request() -> None:
    together = threading.Barrier(3, timeout=30)
    asked: list[str] = []
    # Every look at the clock is a second later: each client sees that the time is over after its first answer.
    clock = itertools.count(0, 1.0)

    def answer(request: Request) -> Sample:
        together.wait()  # passes only with all three inside
        asked.append(request.prompt)
        return sample(1)

    run = run_load(answer, requests(2), clients=3, duration=0.5, clock=lambda: next(clock))
    assert sorted(asked) == ["question 0", "question 0", "question 1"]
    assert (run.clients, len(run.samples)) == (3, 3)
    # The start is 0; then one look by each client, and one at the end.
    assert run.seconds == 4.0


def test_a_client_goes_on_until_the_time_is_over() -> None:
    clock = itertools.count(0, 1.0)
    asked: list[str] = []

    def answer(request: Request) -> Sample:
        asked.append(request.prompt)
        return sample(1)

    run = run_load(answer, requests(2), clients=1, duration=3.0, clock=lambda: next(clock))
    assert asked == ["question 0", "question 1", "question 0"]
    assert run.seconds == 4.0


def test_what_one_client_meets_ends_all() -> None:
    def answer(request: Request) -> Sample:
        if request.prompt == "question 1":
            raise QavpError("the context is full")
        return sample(1)

    # The clock stands still: only the error ends the other client.
    with pytest.raises(QavpError, match="the context is full"):
        run_load(answer, requests(2), clients=2, duration=1.0, clock=lambda: 0.0)


@pytest.mark.parametrize(("clients", "duration"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_no_load_is_refused(clients: int, duration: float) -> None:
    with pytest.raises(InputError, match="are no load"):
        run_load(lambda _: sample(1), requests(1), clients, duration)
