"""The output `kept_indices` of a graph that keeps everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qavp_export.errors import GraphError
from qavp_export.passes import KeepAllTokens
from tests.passes.graphs import run


def _model(shape: str) -> ir.Model:
    text = f'<ir_version: 11, opset_import: ["": 23]> g (float[{shape}] x) => (float[{shape}] image_features)'
    return ir.from_proto(onnx.parser.parse_model(text + " { [copy] image_features = Identity (x) }"))


def test_indices_count_the_tokens_of_every_image(tmp_path: Path) -> None:
    model = _model("B,5,4")
    assert KeepAllTokens()(model).matched == 1
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    features = np.ones((3, 5, 4), np.float32)
    same, kept = session.run(["image_features", "kept_indices"], {"x": features})
    np.testing.assert_array_equal(same, features)
    np.testing.assert_array_equal(kept, [[0, 1, 2, 3, 4]] * 3)


@pytest.mark.parametrize("axis", ["N", "?"])
def test_indices_count_as_many_tokens_as_there_are(axis: str) -> None:
    model = _model(f"B,{axis},4")
    KeepAllTokens()(model)
    for count in (5, 3):
        features, kept = run(model, {"x": np.ones((2, count, 4), np.float32)})
        assert features.shape == (2, count, 4)
        np.testing.assert_array_equal(kept, [range(count)] * 2)


def test_running_twice_is_refused() -> None:
    model = _model("B,5,4")
    KeepAllTokens()(model)
    with pytest.raises(GraphError, match="kept_indices"):
        KeepAllTokens()(model)
