"""The TensorRT runtime beside the real package, which needs no GPU to be imported, and without everything else."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qavp_export.engines.cuda import driver
from tests.engines import fake_cuda
from tests.engines import fake_tensorrt as fake
from tests.runtime import tiny_bundle

# What stands for what. The tests of the engine run on the fakes, so that it uses nothing that these lack.
_STANDS_FOR: dict[type, str] = {
    fake.FakeRuntime: "Runtime",
    fake.FakeEngineThatAliases: "ICudaEngine",
    fake.FakeContext: "IExecutionContext",
    fake.ILogger: "ILogger",
    fake.TensorIOMode: "TensorIOMode",
    fake.TensorLocation: "TensorLocation",
    fake.ExecutionContextAllocationStrategy: "ExecutionContextAllocationStrategy",
    fake.DataType: "DataType",
    fake.CudaGraphStrategy: "CudaGraphStrategy",
    fake.FakeConfig: "IRuntimeConfig",
}
# The libraries of TensorRT-RTX must not share a process with those of ONNX Runtime.
_ATTRIBUTES = """
import json, sys
import tensorrt_rtx as trt
found = {name: dir(getattr(trt, name)) for name in json.loads(sys.argv[1])}
print(json.dumps([trt.__version__, found]))
"""
_DESERIALIZE = """
import sys
from pathlib import Path
from qavp_export.engines.tensorrt.library import Library
from qavp_export.errors import BundleError
library = Library("tensorrt-rtx")
try:
    library.deserialize(Path(sys.argv[1]))
except BundleError as error:
    print(error)
"""
_IMPORT = """
import sys
for name in ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "pydantic", "tensorrt", "cuda"):
    sys.modules[name] = None
at_start = set(sys.modules)
import json
from pathlib import Path
from qavp_export import QavpModel
from qavp_export.engines.tensorrt.runtime import TensorRtEngine, TensorRtRtxEngine
new = {name for name, module in sys.modules.items() if module is not None} - at_start
try:
    QavpModel.from_bundle(sys.argv[1], "tensorrt")
except Exception as error:
    print(json.dumps([type(error).__name__, str(error), sorted({name.partition(".")[0] for name in new})]))
"""

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)


def _run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _public(kind: type) -> set[str]:
    own: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        own.update(vars(base))
    members = getattr(kind, "__members__", None)
    return set(members) if members is not None else {name for name in own if not name.startswith("_")}


@needs_rtx
def test_what_is_used_is_there() -> None:
    version, found = json.loads(_run(_ATTRIBUTES, json.dumps(list(_STANDS_FOR.values()))))
    assert version.count(".") == 3
    for kind, name in _STANDS_FOR.items():
        used = _public(kind)
        assert used, name
        assert used <= set(found[name]), name
    assert {"cuda_graph_strategy", "set_runtime_cache"} <= set(found["IRuntimeConfig"])
    assert {"deserialize_cuda_engine"} <= _public(fake.FakeRuntime)


@pytest.mark.parametrize(
    ("kind", "real", "own"),
    [
        (fake_cuda.FakeDevice, driver.Device, {"allocations", "at", "find", "check_thread"}),
        (fake_cuda.FakeBuffer, driver.Buffer, set()),
        (fake_cuda.FakeStream, driver.Stream, {"submit", "transfer", "capturing"}),
        (fake_cuda.FakeGraph, driver.Graph, set()),
    ],
)
def test_the_device_is_called_as_the_drivers_is(kind: type, real: type, own: set[str]) -> None:
    for name in {name for name, member in vars(kind).items() if callable(member) and name[0] != "_"} - own:
        parameters = [list(inspect.signature(getattr(each, name)).parameters) for each in (kind, real)]
        assert parameters[0] == parameters[1], name


@needs_rtx
def test_a_file_that_is_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "bad.engine"
    path.write_bytes(b"nonsense" * 100)
    # With no GPU it is the driver that is missed; either way it is one line that gives the reason.
    message = _run(_DESERIALIZE, str(path)).strip()
    assert message.startswith(f"{path} cannot be deserialized by TensorRT-RTX ")
    assert "Error Code" in message
    assert "\n" not in message


def test_the_runtime_needs_neither_torch_nor_onnx_runtime(tmp_path: Path) -> None:
    bundle = tiny_bundle.write_bundle(tmp_path / "bundle")
    kind, message, new = json.loads(_run(_IMPORT, str(bundle)))
    assert kind == "UnavailableError"
    assert message == (
        f"bundle {bundle} has no engine for tensorrt; export it with --engine tensorrt on a machine with this GPU"
    )
    installed = set(new) - set(sys.stdlib_module_names)
    assert {"qavp_export", "numpy"} <= installed
    assert not installed & {"torch", "transformers", "onnxruntime", "cuda", "tensorrt", "tensorrt_rtx"}
