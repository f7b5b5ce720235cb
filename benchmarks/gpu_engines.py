"""Runs a bundle's GPU engines end to end, each in processes of its own, and compares them with the CPU's."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_report import Check, Timing
from latency_process import run

from qavp_export.errors import QavpError

ENGINES = ("ort-cuda", "tensorrt", "tensorrt-rtx")
REFERENCE = "ort-cpu"
SAMPLES = Path(__file__).parents[1] / "examples" / "shapes_vqa" / "samples"
# Engines round differently: a question whose two best answers are close may be answered otherwise.
AGREEMENT = 0.9
_TEXT, _TOKENS, _REPEATS, _THREADS = 64, 32, 5, 8
_FOLDER = Path(__file__).parent


@dataclass
class EngineResults:
    """What the engines of some bundles did.

    Attributes:
        checks: Answers beside the CPU's.
        timings: Stages, of random prompts.
        missing: Engines that cannot run here, and why.
    """

    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def measure(self, bundle: Path, *, answers: bool) -> None:
        """Runs every engine on a bundle.

        Args:
            bundle: The bundle's folder.
            answers: Whether the model was trained, so that its answers to the demo's questions can be compared.
        """
        expected = _answers(bundle, REFERENCE) if answers else []
        for engine in ENGINES:
            name = f"{engine} on {bundle.name}"
            try:
                if answers:
                    self.checks.append(_compare(engine, bundle, expected))
                self.timings += _timings(engine, bundle)
                self.checks += _load_alone(engine, bundle)
            except QavpError as error:
                self.missing[name] = str(error)


def _load_alone(engine: str, bundle: Path) -> list[Check]:
    """Loads a bundle's engines with `trtexec`, which knows nothing of our package: kernels must be in the engines."""
    tool = shutil.which("trtexec")
    if engine != "tensorrt" or tool is None:
        return []
    checks = []
    for path in sorted((bundle / "engines" / engine).glob("*.engine")):
        command = [tool, f"--loadEngine={path}", "--skipInference"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        said = (result.stderr or result.stdout).strip().splitlines()
        checks.append(Check("trtexec", path.name, result.returncode == 0, said[-1] if said else "it said nothing"))
    return checks


def _compare(engine: str, bundle: Path, expected: Sequence[str]) -> Check:
    found = _answers(bundle, engine)
    same = statistics.mean(one == other for one, other in zip(found, expected, strict=True))
    return Check(engine, bundle.name, same >= AGREEMENT, f"{same:.0%} of {len(found)} answers are {REFERENCE}'s")


def _answers(bundle: Path, engine: str) -> list[str]:
    lines = (SAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    items = [{"image": str(SAMPLES / item["image"]), "question": item["question"]} for item in items]
    task = {"bundle": str(bundle), "engine": engine, "items": items, "tokens": 8}
    answers: list[str] = _worker("gpu_answers.py", task)["answers"]
    return answers


def _timings(engine: str, bundle: Path) -> list[Timing]:
    task = {"bundle": str(bundle), "engine": engine, "text": _TEXT, "tokens": _TOKENS, "threads": _THREADS}
    answer = _worker("latency_worker.py", {**task, "repeats": _REPEATS, "config": {}, "kv_cache": None})
    prompt = f"{bundle.name}, {answer['details']['prompt_tokens']} tokens"
    return [
        Timing(f"{engine} {stage}", prompt, 1e6 * statistics.median(answer["timings"][stage]))
        for stage in ("vision", "prefill", "ttft", "tpot")
    ]


def _worker(script: str, task: Mapping[str, Any]) -> dict[str, Any]:
    return run([sys.executable, str(_FOLDER / script), json.dumps(task)])[0]
