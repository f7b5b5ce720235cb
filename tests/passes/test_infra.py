"""The pass contract: conditions that fail reach users as their own one-line error."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qavp_export.errors import GraphError
from qavp_export.passes import Refusal, RewritePass, RewriteResult
from tests.passes.graphs import graph


class _Probe(RewritePass):
    """Fails where it is told to."""

    def __init__(self, requires: Exception | None = None, ensures: Exception | None = None) -> None:
        self._errors = requires, ensures

    def requires(self, model: ir.Model) -> None:
        self._fail(model, 0)

    def call(self, model: ir.Model) -> RewriteResult:
        return RewriteResult(model, modified=False, matched=2, refused=[Refusal("node", "too wide")])

    def ensures(self, model: ir.Model) -> None:
        self._fail(model, 1)

    def _fail(self, model: ir.Model, index: int) -> None:
        assert model.graph.name == "hand_made"
        error = self._errors[index]
        if error is not None:
            raise error


def _model() -> ir.Model:
    return graph("(float[2] x) => (float[2] y)", "y = Neg (x)")


def test_result_carries_matches_and_refusals() -> None:
    model = _model()
    result = _Probe()(model)
    assert result.model is model
    assert (result.modified, result.matched) == (False, 2)
    assert result.refused == [Refusal(node_name="node", reason="too wide")]
    assert _Probe()(result).model is model


@pytest.mark.parametrize("condition", ["requires", "ensures"])
def test_errors_of_this_project_are_not_wrapped(condition: str) -> None:
    error = GraphError("no such value")
    with pytest.raises(GraphError) as caught:
        _Probe(**{condition: error})(_model())
    assert caught.value is error


def test_other_errors_keep_onnx_ir_s_wrapping() -> None:
    with pytest.raises(ir.passes.PreconditionError):
        _Probe(requires=ValueError("a bug"))(_model())
    with pytest.raises(ir.passes.PostconditionError):
        _Probe(ensures=ValueError("a bug"))(_model())
