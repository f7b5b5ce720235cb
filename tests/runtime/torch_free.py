"""Runs a bundle in a process in which neither torch nor the exporter's libraries can be imported."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
import sys

at_start = set(sys.modules)
# None makes a module look as if it were not installed, to `import` and to `importlib.util.find_spec` alike.
for name in (
    "torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "optimum", "pydantic", "typer", "click", "rich",
):
    sys.modules[name] = None

import json
from qavp_export import EngineOptions, QavpModel

heavy = {"transformers", "onnxruntime"} & set(sys.modules)
bundle, engine, image, first, second = sys.argv[1:]
model = QavpModel.from_bundle(bundle, engine, EngineOptions(threads=1))
answer = model.generate(image, first, max_new_tokens=6)
streamed = "".join(model.generate(image, first, max_new_tokens=6, stream=True))
ids = model.generate_ids([image, None], [first, second], max_new_tokens=6)
new = {name for name, module in sys.modules.items() if module is not None} - at_start
print(json.dumps({
    "answer": answer, "streamed": streamed, "ids": ids, "heavy": sorted(heavy),
    "top": sorted({name.partition(".")[0] for name in new}),
    "own": sorted(name for name in new if name.partition(".")[0] == "qavp_export"),
}))
"""
# jinja2 renders chat templates; transformers uses it without requiring it.
_RUNTIME = frozenset({"numpy", "onnxruntime", "onnxruntime-gpu", "transformers", "pillow", "jinja2"})


@dataclass(frozen=True)
class Report:
    """What happened in the process.

    Attributes:
        answer: The first prompt's answer.
        streamed: The same, streamed.
        ids: Token ids of both answers.
        heavy: Libraries that were loaded before a model was.
        top: Top-level modules that were loaded.
        own: Modules of qavp_export that were loaded.
    """

    answer: str
    streamed: str
    ids: list[list[int]]
    heavy: list[str]
    top: list[str]
    own: list[str]

    def check_distributions(self) -> None:
        """Fails if more was loaded than what a production container has."""
        by_module = importlib.metadata.packages_distributions()
        used = {_normal(name) for top in self.top for name in by_module.get(top, [])} - {"qavp-export"}
        allowed = _with_dependencies(_RUNTIME)
        assert used <= allowed, used - allowed
        assert {"numpy", "transformers", "pillow"} < used
        assert self.heavy == [], "import qavp_export should not import what only a loaded model needs"


def run_torch_free(bundle: Path, engine: str, image: Path, prompts: tuple[str, str]) -> Report:
    """Asks the first prompt about an image, and both in one batch, the second without an image."""
    command = [sys.executable, "-c", _SCRIPT, str(bundle), engine, str(image), *prompts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Report(**json.loads(done.stdout))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_dependencies(roots: Iterable[str]) -> set[str]:
    """The distributions in `roots` and all that they require without extras, of those that are installed."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        names = [re.match(r"[\w.-]+", text) for text in requires if "extra ==" not in text]
        todo += [_normal(match.group()) for match in names if match is not None]
    return found
