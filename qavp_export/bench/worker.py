"""The process of one bundle and engine: reads orders, one JSON object a line, and answers each with one line.

It ends when its input does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from qavp_export.bench.clock import TimedEngine
from qavp_export.bench.load import run_load
from qavp_export.bench.memory import DeviceMemory, host_peak
from qavp_export.bench.request import Request, Sample, answer
from qavp_export.engines import EngineOptions, load_engine
from qavp_export.errors import InputError, QavpError
from qavp_export.manifest import Manifest
from qavp_export.runtime import QavpModel

_ON_CPU = ("ort-cpu", "ort-reference")


class Worker:
    """A bundle, opened by one engine.

    Args:
        bundle: The bundle's folder.
        engine: The engine's name.
        threads: Threads inside one operator; None: the engine's default.
    """

    def __init__(self, bundle: Path, engine: str, threads: int | None) -> None:
        self._bundle, self._engine_name = bundle, engine
        self._options = EngineOptions(threads=threads)
        self._host_before = host_peak()
        self._device = None if engine in _ON_CPU else DeviceMemory()
        started = time.perf_counter()
        manifest = Manifest.read(bundle)
        # An answer of the same length from all: no token ends it.
        endless = dataclasses.replace(manifest, decoder=dataclasses.replace(manifest.decoder, eos_token_ids=[]))
        self._engine = TimedEngine(load_engine(engine, bundle, manifest, self._options))
        self._model = QavpModel(bundle, endless, self._engine)
        self._load_seconds = time.perf_counter() - started

    def loaded(self) -> dict[str, Any]:
        """Returns what loading took."""
        device = None if self._device is None else self._device.device_name
        return {"load_seconds": self._load_seconds, "host_before_bytes": self._host_before, "device": device}

    def run(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Answers one request."""
        return dataclasses.asdict(self._answer(_request(order["request"])))

    def device_memory(self, order: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  # as the other orders
        """Returns the most memory of the GPU so far, and stops to watch it."""
        return {"device_peak_bytes": None if self._device is None else self._device.stop()}

    def host_memory(self, order: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  # as the other orders
        """Returns the most memory of the host so far."""
        return {"host_peak_bytes": host_peak()}

    def load(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Serves several clients at once."""
        requests = [_request(request) for request in order["requests"]]
        return dataclasses.asdict(run_load(self._answer, requests, order["clients"], order["duration"]))

    def scoring(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the vision encoder with and without scoring and gather."""
        from qavp_export.bench.scoring import measure_scoring

        shown = self._engine.shown
        whole, without = measure_scoring(self._bundle, self._engine_name, self._options, shown, order["repeats"])
        return {"with": whole, "without": without}

    def _answer(self, request: Request) -> Sample:
        return answer(self._model, self._engine, request)


def serve(orders: TextIO, answers: TextIO) -> None:
    """Answers orders until there are no more. The first one opens the bundle."""
    worker: Worker | None = None
    for line in orders:
        order = json.loads(line)
        try:
            if worker is None:
                worker = Worker(Path(order["bundle"]), order["engine"], order["threads"])
                result = worker.loaded()
            else:
                handlers: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
                    "run": worker.run,
                    "device_memory": worker.device_memory,
                    "host_memory": worker.host_memory,
                    "load": worker.load,
                    "scoring": worker.scoring,
                }
                result = handlers[order["order"]](order)
        except QavpError as error:
            kind = "input" if isinstance(error, InputError) else "unavailable" if error.exit_code == 3 else "other"
            result = {"error": str(error), "kind": kind}
        except Exception as error:
            # Libraries raise what they like; the process that asked says who failed, and how.
            result = {"error": f"unexpected {type(error).__name__}: {error}", "kind": "other"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


def _request(data: Mapping[str, Any]) -> Request:
    return Request(tuple(data["images"]), data["prompt"], data["tokens"], data["keep"])


def main(descriptor: int) -> None:
    """Serves this process's stdin; answers go to a descriptor of their own, so that nothing printed comes between."""
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        serve(sys.stdin, out)
