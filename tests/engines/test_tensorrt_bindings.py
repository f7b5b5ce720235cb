"""What the worker and the runtime ask of TensorRT is in the real bindings of the oldest release and of the newest."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qavp_export.engines.tensorrt.keys import TENSORRT
from qavp_export.engines.tensorrt.lowering.capabilities import capabilities_of
from tests.engines import bindings_probe
from tests.engines.plugin_probe import stub_libraries

ROOT = Path(__file__).parents[2]
BINDINGS = {11: None, 10: ROOT / "build" / "tensorrt-10"}
# Layer types that come with an operator.
LAYERS = {"Attention": "ATTENTION_OUTPUT", "TensorScatter": "KV_CACHE_UPDATE", "RotaryEmbedding": "ROTARY_EMBEDDING"}

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="TensorRT is for Linux x86_64 here"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the stub libraries need a C compiler"),
]


@pytest.mark.parametrize("major", BINDINGS)
def test_an_engine_is_built_and_run_with_names_that_are_there(major: int, tmp_path: Path) -> None:
    folder = BINDINGS[major]
    if folder is None:
        spec = importlib.util.find_spec("tensorrt_bindings")
        folder = None if spec is None or spec.origin is None else Path(spec.origin).parents[1]
    if folder is None or not (folder / "tensorrt_bindings").is_dir():
        pytest.skip(f"the bindings of TensorRT {major} are not installed: make build/tensorrt-10")
    stub_libraries(tmp_path, major)
    command = [sys.executable, bindings_probe.__file__, str(folder)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"].startswith({11: "11.", 10: "10.13."}[major])
    assert found["built"]
    operators = capabilities_of(TENSORRT, found["version"]).operators
    assert {LAYERS[name] for name in operators if name in LAYERS} == set(found["layers"])
    assert found["in_place"] == ("TensorScatter" in operators)


@pytest.mark.parametrize(
    ("version", "operators"),
    [
        # As NVIDIA's changelog of the parser adds them.
        ("10.13.0.35", set()),
        ("10.14.1.48.post1", {"Attention"}),
        ("10.15.1.29", {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}),
        ("11.0.0", {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}),
    ],
)
def test_operators_by_release(version: str, operators: set[str]) -> None:
    assert capabilities_of(TENSORRT, version).operators == operators
