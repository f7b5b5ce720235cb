"""Several requests at once on one loaded model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qavp_export.bench.request import Request, Sample
from qavp_export.errors import InputError


@dataclass(frozen=True)
class LoadRun:
    """What concurrent clients got; each sends its next request when it has the answer to the last.

    Attributes:
        clients: How many there were.
        seconds: From the first request to the last answer.
        samples: What each request took, in the order in which they ended.
    """

    clients: int
    seconds: float
    samples: tuple[Sample, ...]


def run_load(
    answer: Callable[[Request], Sample],
    requests: Sequence[Request],
    clients: int,
    duration: float,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadRun:
    """Sends requests from several threads until the time is over; requests in flight are waited for, and count.

    Args:
        answer: Answers one request; called from all threads at once.
        requests: What the clients ask, in turn; each begins at another.
        clients: How many threads.
        duration: After so many seconds no request is begun; every client sends one at least.
        clock: Tells the time in seconds.

    Raises:
        InputError: There are no clients, or no time.
        Exception: What `answer` raises; no client begins another request then.
    """
    if clients < 1 or not duration > 0:
        raise InputError(f"{clients} clients for {duration:g} seconds are no load; give 1 or more, and a time above 0")
    samples: list[Sample] = []
    stop = threading.Event()
    started = clock()

    def client(number: int) -> None:
        turn = number
        try:
            while True:
                samples.append(answer(requests[turn % len(requests)]))
                turn += 1
                if stop.is_set() or clock() - started >= duration:
                    return
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(clients, thread_name_prefix="client") as pool:
        running = [pool.submit(client, number) for number in range(clients)]
    ended = clock()
    for future in running:
        future.result()
    return LoadRun(clients, ended - started, tuple(samples))


def load_from_dict(data: dict[str, Any]) -> LoadRun:
    """Reads what `dataclasses.asdict` made of a run."""
    return LoadRun(data["clients"], data["seconds"], tuple(Sample(**sample) for sample in data["samples"]))
