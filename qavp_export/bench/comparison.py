"""Measures contestants in turn, so that what drifts (clocks, temperature, other programs) hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qavp_export.bench.contestant import Contestant, Entry, Loaded
from qavp_export.bench.load import LoadRun
from qavp_export.bench.request import Request, Sample
from qavp_export.errors import InputError, QavpError, UnavailableError

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]
Opener = Callable[[Entry], AbstractContextManager[Contestant]]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        entries: The contestants; ratios are against the first that runs.
        requests: What each is asked, one a round, from the first again after the last.
        warmup: Requests before those that count, for each contestant.
        repeats: Rounds that count.
        clients: Concurrent clients of the load test; 0: none.
        duration: Its seconds.
    """

    entries: tuple[Entry, ...]
    requests: tuple[Request, ...]
    warmup: int
    repeats: int
    clients: int = 0
    duration: float = 0.0

    def check(self) -> None:
        """Checks the values.

        Raises:
            InputError: One is out of range.
        """
        if not self.entries:
            raise InputError("there is nothing to compare; give at least one bundle and one engine")
        if not self.requests or any(request.tokens < 1 for request in self.requests):
            raise InputError("there is nothing to ask; give at least one image, and --tokens 1 or more")
        if self.warmup < 1 or self.repeats < 2:
            raise InputError("--warmup is 1 or more, --repeats 2 or more: one figure has no spread")
        if self.clients < 0 or (self.clients and not self.duration > 0):
            raise InputError("--load is 1 or more clients, and --duration more than 0 seconds")
        labels = [entry.label for entry in self.entries]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise InputError(f"{twice} is there twice; give each bundle and engine once")


@dataclass
class Measured:
    """What a contestant took.

    Attributes:
        entry: What it is.
        loaded: What loading took.
        bundle_bytes: Size of the bundle's files.
        samples: One for each round.
        host_peak_bytes: Most host memory until after the last round.
        device_peak_bytes: Most memory of the GPU, from loading to the end of the warm-up; None: not known.
        scoring: Seconds of runs of the vision encoder with and without scoring and gather; None: not told apart.
        scoring_reason: Why not.
        load: The load test, if there was one.
    """

    entry: Entry
    loaded: Loaded
    bundle_bytes: int
    samples: list[Sample] = field(default_factory=list)
    host_peak_bytes: int = 0
    device_peak_bytes: int | None = None
    scoring: tuple[list[float], list[float]] | None = None
    scoring_reason: str | None = None
    load: LoadRun | None = None


@dataclass(frozen=True)
class Missing:
    """A contestant without figures.

    Attributes:
        entry: What it is.
        reason: Why.
        failed: Whether it broke, rather than being unavailable here.
    """

    entry: Entry
    reason: str
    failed: bool


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        measured: The contestants that ran, in the order of the plan.
        missing: Those that did not.
    """

    measured: tuple[Measured, ...]
    missing: tuple[Missing, ...]


def turn(number: int, contestants: int) -> list[int]:
    """Returns the order of a round: every contestant comes at every place, and both before and after its neighbours.

    Args:
        number: The round, from 0.
        contestants: How many there are.
    """
    start = number // 2 % contestants
    order = [(start + place) % contestants for place in range(contestants)]
    return order[::-1] if number % 2 else order


def compare(plan: Plan, opener: Opener, progress: Progress) -> Comparison:
    """Opens the contestants, one after the other, and measures them in turn.

    A contestant that fails is listed with the reason, and the others go on.

    Args:
        plan: What is measured.
        opener: Opens a contestant.
        progress: Called as the work goes on.

    Raises:
        InputError: The plan has a value out of range.
    """
    plan.check()
    with ExitStack() as stack:
        field_ = _Field(plan, progress)
        for number, entry in enumerate(plan.entries):
            progress("load and warm up", number, len(plan.entries))
            field_.open(entry, opener, stack)
        field_.rounds()
        field_.each("memory", _host_memory)
        if plan.clients:
            field_.each("load test", lambda runner: _load(runner, plan.requests, plan.clients, plan.duration))
        field_.each("scoring and gather", lambda runner: _scoring(runner, plan.repeats))
        return field_.result()


@dataclass
class _Runner:
    contestant: Contestant
    measured: Measured


class _Field:
    """The contestants that are still in, and those that are out."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._runners: list[_Runner] = []
        self._missing: list[Missing] = []

    def open(self, entry: Entry, opener: Opener, stack: ExitStack) -> None:
        try:
            contestant = stack.enter_context(opener(entry))
        except QavpError as error:
            failed = not isinstance(error, InputError | UnavailableError)
            self._missing.append(Missing(entry, str(error), failed))
            return
        runner = _Runner(contestant, Measured(entry, contestant.loaded, folder_bytes(entry.bundle)))
        self._runners.append(runner)
        # Here and not later: the memory of a GPU is told for all processes together.
        self._try(runner, self._warm_up)

    def _warm_up(self, runner: _Runner) -> None:
        requests = self._plan.requests
        for number in range(max(self._plan.warmup, len(set(requests)))):
            runner.contestant.run(requests[number % len(requests)])
        runner.measured.device_peak_bytes = runner.contestant.device_peak()

    def rounds(self) -> None:
        plan = self._plan
        for number in range(plan.repeats):
            self._progress("measure", number, plan.repeats)
            request = plan.requests[number % len(plan.requests)]
            runners = list(self._runners)
            for place in turn(number, len(runners)) if runners else []:
                self._try(runners[place], partial(_sample, request))

    def each(self, stage: str, do: Callable[[_Runner], None]) -> None:
        for number, runner in enumerate(list(self._runners)):
            self._progress(stage, number, len(self._runners))
            self._try(runner, do)

    def _try(self, runner: _Runner, do: Callable[[_Runner], None]) -> None:
        try:
            do(runner)
        except QavpError as error:
            self._runners.remove(runner)
            self._missing.append(Missing(runner.measured.entry, str(error), failed=True))

    def result(self) -> Comparison:
        places = {entry: place for place, entry in enumerate(self._plan.entries)}
        return Comparison(
            tuple(runner.measured for runner in self._runners),
            tuple(sorted(self._missing, key=lambda missing: places[missing.entry])),
        )


def _sample(request: Request, runner: _Runner) -> None:
    runner.measured.samples.append(runner.contestant.run(request))


def _host_memory(runner: _Runner) -> None:
    runner.measured.host_peak_bytes = runner.contestant.host_peak()


def _load(runner: _Runner, requests: Sequence[Request], clients: int, duration: float) -> None:
    runner.measured.load = runner.contestant.load(requests, clients, duration)


def _scoring(runner: _Runner, repeats: int) -> None:
    try:
        runner.measured.scoring = runner.contestant.scoring(repeats)
    except UnavailableError as error:
        runner.measured.scoring_reason = str(error)


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
