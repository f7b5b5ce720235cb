"""External data: each tensor in its place, once, in any order, and again only if it is not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from qavp_export.journal import Journal
from qavp_export.weight_file import WeightFile

RNG = np.random.default_rng(0)
ARRAYS: dict[str, npt.NDArray[np.generic]] = {
    "codes": RNG.integers(-8, 8, (7, 5)).astype(ml_dtypes.int4),
    "multipliers": RNG.integers(0, 16, (3, 3)).astype(ml_dtypes.uint4),
    "half": RNG.standard_normal((33, 9)).astype(np.float16),
    "single": RNG.standard_normal((40, 30)).astype(np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
Read = Callable[[str], None]


def _model(read: Read = lambda _: None) -> ir.Model:
    def lazy(name: str) -> ir.Value:
        dtype = ir.DataType.from_numpy(ARRAYS[name].dtype)

        def evaluate() -> ir.TensorProtocol:
            read(name)
            return ir.Tensor(ARRAYS[name], name=name)

        shape = ir.Shape(ARRAYS[name].shape)
        tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)
        return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)

    weights = [lazy(name) for name in ARRAYS]
    outputs = []
    for weight in weights:
        node = ir.node("Identity", [weight], name=f"/{weight.name}")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = (
            f"{weight.name}.out",
            weight.shape,
            weight.type,
        )
        outputs.append(node.outputs[0])
    nodes = [node for output in outputs if (node := output.producer()) is not None]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=11)


def _file(folder: Path, model: ir.Model, limit: int | None = None) -> WeightFile:
    return WeightFile(folder / "model.onnx", model, Journal(folder / "journal").section("w"), limit)


def _stored(folder: Path) -> dict[str, npt.NDArray[np.generic]]:
    # onnx reads what onnx_ir has written.
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _assert_complete(folder: Path) -> None:
    stored = _stored(folder)
    assert stored.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert stored[name].dtype == array.dtype
        np.testing.assert_array_equal(stored[name].astype(np.float64), array.astype(np.float64))


def test_tensors_lie_beside_the_graph(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    _file(tmp_path, _model()).finish(lambda *step: steps.append(step))
    assert steps == [(number, 5) for number in range(5)]
    _assert_complete(tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size < 3000
    tensors = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    offsets = [int(entry.value) for tensor in tensors for entry in tensor.external_data if entry.key == "offset"]
    # Aligned for any vector instruction.
    assert len(offsets) == 5
    assert all(offset % 64 == 0 for offset in offsets)


def test_the_order_of_writing_does_not_show(tmp_path: Path) -> None:
    for name, order in (("a", list(ARRAYS)), ("b", list(ARRAYS)[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        file = _file(folder, _model())
        for tensor in order[:3]:
            file.write(tensor, ir.Tensor(ARRAYS[tensor], name=tensor))
        file.finish(lambda *_: None)
        _assert_complete(folder)
    for part in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    reads: list[str] = []

    def interrupt(name: str) -> None:
        if name == "single":
            raise KeyboardInterrupt
        reads.append(name)

    with pytest.raises(KeyboardInterrupt):
        _file(tmp_path, _model(interrupt)).finish(lambda *_: None)
    assert reads == ["codes", "multipliers", "half"]
    reads.clear()
    file = _file(tmp_path, _model(reads.append))
    assert [name for name in ARRAYS if file.holds(name)] == ["codes", "multipliers", "half"]
    file.finish(lambda *_: None)
    assert reads == ["single", "empty"]
    _assert_complete(tmp_path)


def test_a_tensor_that_did_not_reach_the_disk_is_written_again(tmp_path: Path) -> None:
    _file(tmp_path, _model()).finish(lambda *_: None)
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "model.onnx.data").write_bytes(data)
    reads: list[str] = []
    _file(tmp_path, _model(reads.append)).finish(lambda *_: None)
    assert reads == ["codes"]
    _assert_complete(tmp_path)


def test_a_file_system_with_small_files_gets_several(tmp_path: Path) -> None:
    _file(tmp_path, _model(), limit=1000).finish(lambda *_: None)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("model.onnx.data*")}
    # The largest tensor, of 4800 bytes, has a file of its own.
    assert sorted(sizes) == ["model.onnx.data", "model.onnx.data.1", "model.onnx.data.2"]
    assert sizes["model.onnx.data.1"] == 4800
    _assert_complete(tmp_path)


@pytest.mark.parametrize(("answer", "files"), [(OSError(), 1), (ValueError(), 1), (-1, 1), (64, 1), (11, 3)])
def test_the_file_system_says_how_large_a_file_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Exception | int, files: int
) -> None:
    def pathconf(_folder: Path, _name: str) -> int:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os, "pathconf", pathconf)
    _file(tmp_path, _model()).finish(lambda *_: None)
    # 11 bits are a signed size of at most 1023.
    assert len(list(tmp_path.glob("model.onnx.data*"))) == files
    _assert_complete(tmp_path)


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    file = _file(tmp_path, _model())
    with pytest.raises(ValueError, match="half has 8 bytes; its place has 594"):
        file.write("half", ir.Tensor(np.zeros((2, 2), np.float16), name="half"))
