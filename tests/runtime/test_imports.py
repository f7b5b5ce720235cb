"""The runtime works where neither torch nor the exporter's libraries are installed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys

import numpy as np
from PIL import Image

from tests.runtime.tiny_bundle import ASSISTANT, BOS, USER, WORDS, reference_answer

SCRIPT = """
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
model = QavpModel.from_bundle(sys.argv[1], "ort-reference", EngineOptions(threads=1))
answer = model.generate(sys.argv[2], "w0 w3", max_new_tokens=6)
streamed = "".join(model.generate(sys.argv[2], "w0 w3", max_new_tokens=6, stream=True))
ids = model.generate_ids([sys.argv[2], None], ["w0 w3", "w1"], max_new_tokens=6)
new = {name for name, module in sys.modules.items() if module is not None} - at_start
print(json.dumps({
    "answer": answer, "streamed": streamed, "ids": ids, "heavy": sorted(heavy),
    "top": sorted({name.partition(".")[0] for name in new}),
    "own": sorted(name for name in new if name.partition(".")[0] == "qavp_export"),
}))
"""
# jinja2 renders chat templates; transformers uses it without requiring it.
RUNTIME = {"numpy", "onnxruntime", "onnxruntime-gpu", "transformers", "pillow", "jinja2"}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(roots):
    """The distributions in `roots` and all that they require without extras, of those that are installed."""
    found, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [normal(re.match(r"[\w.-]+", text).group()) for text in requires if "extra ==" not in text]
    return found


def test_generates_with_only_the_runtimes_distributions(bundle, tmp_path, pictures):
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    command = [sys.executable, "-c", SCRIPT, str(bundle), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)

    def chat(shown, *words):
        return [BOS, USER, *shown, *(WORDS.index(word) for word in words), ASSISTANT]

    expected = [
        reference_answer(chat([np.asarray(pictures[0])], "w0", "w3"), 6),
        reference_answer(chat([], "w1"), 6),
    ]
    assert report["ids"] == expected
    assert report["answer"] == report["streamed"] == " ".join(WORDS[i] for i in expected[0] if i >= 5)

    by_module = importlib.metadata.packages_distributions()
    used = {normal(name) for top in report["top"] for name in by_module.get(top, [])} - {"qavp-export"}
    assert used <= with_dependencies(RUNTIME), used - with_dependencies(RUNTIME)
    assert {"numpy", "transformers", "pillow"} < used

    allowed = ("qavp_export.runtime", "qavp_export.engines")
    others = {name for name in report["own"] if not name.startswith(allowed)}
    numerics = {"qavp_export.numerics", "qavp_export.numerics.select", "qavp_export.numerics._checks"}
    assert others == {"qavp_export", "qavp_export.errors", "qavp_export.manifest", *numerics}
    assert report["heavy"] == [], "import qavp_export should not import what only a loaded model needs"
