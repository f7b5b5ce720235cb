"""A walk through a graph: the values of one run of the whole graph, with few weights and few values at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qavp_export.calibration.stops import find_stops
from qavp_export.calibration.walk import Walk
from qavp_export.families import Plan
from qavp_export.passes import PlaceQdq, Rotate
from tests.passes.decoders import hand_made, llama_decoder
from tests.passes.graphs import session

Feeds = Mapping[str, npt.NDArray[np.generic]]
LENGTHS = (5, 9, 1)


def decoder_feeds(plan: Plan, lengths: Sequence[int], embeds: npt.NDArray[np.float32]) -> list[Feeds]:
    """A prompt of each length with an empty cache, cut from `embeds [tokens,D]`."""
    empty = np.zeros((1, plan.num_key_value_heads, 0, plan.head_dim), np.float32)
    cache = {f"past_key_values.{layer}.{part}": empty for layer in range(plan.num_layers) for part in ("key", "value")}
    starts = np.cumsum([0, *lengths])
    return [
        {
            "inputs_embeds": embeds[None, start : start + length],
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length)[None],
            **cache,
        }
        for start, length in zip(starts, lengths, strict=False)
    ]


def _decoder() -> tuple[ir.Model, list[Feeds]]:
    """A decoder with everything in it: rotations, quantizers, functions."""
    model, plan = llama_decoder()
    Rotate(32)(model)
    PlaceQdq(32)(model)
    embeds = np.random.default_rng(0).standard_normal((sum(LENGTHS), plan.hidden_size)).astype(np.float32)
    return model, decoder_feeds(plan, LENGTHS, embeds)


def _linears(model: ir.Model) -> list[str]:
    return [
        str(node.name) for node in model.graph if node.op_type == "MatMul" and str(node.name).endswith("proj/MatMul")
    ]


def _whole(model: ir.Model, values: Sequence[ir.Value], feeds: Feeds) -> list[npt.NDArray[np.generic]]:
    tapped = model.clone()
    by_name = {value.name: value for node in tapped.graph for value in node.outputs}
    names = [str(value.name) for value in values]
    tapped.graph.outputs.extend(by_name[name] for name in names if not by_name[name].is_graph_output())
    return session(tapped, optimize=False).run(names, dict(feeds))  # type: ignore[no-any-return]


def test_values_equal_a_run_of_the_whole_graph(tmp_path: Path) -> None:
    model, feeds = _decoder()
    stops = [stop.value for stop in find_stops(model, _linears(model))]
    # q, k and v share an input, gate and up do: 4 inputs in each of 2 layers.
    assert len(stops) == 8
    wanted = [*stops, model.graph.outputs[0]]
    expected = [_whole(model, wanted, feed) for feed in feeds]
    walk = Walk(model, feeds, tmp_path)
    for index, value in enumerate(wanted):
        walk.advance([value])
        for actual, whole in zip(walk.read(value), expected, strict=True):
            # The same kernels on the same shapes: not even rounding differs.
            np.testing.assert_array_equal(actual, whole[index])


def test_several_values_at_once_and_again(tmp_path: Path) -> None:
    model, feeds = _decoder()
    wanted = [stop.value for stop in find_stops(model, _linears(model))][3:5]
    expected = [_whole(model, wanted, feed) for feed in feeds]
    walk = Walk(model, feeds, tmp_path)
    walk.advance(wanted)
    walk.advance([wanted[0]])
    for index, value in enumerate(wanted):
        for actual, whole in zip(walk.read(value), expected, strict=True):
            np.testing.assert_array_equal(actual, whole[index])


def test_only_what_is_needed_stays_on_disk(tmp_path: Path) -> None:
    model, feeds = _decoder()
    walk = Walk(model, feeds, tmp_path)
    counts = []
    for stop in find_stops(model, _linears(model)):
        walk.advance([stop.value])
        counts.append(len(list(tmp_path.glob("*.npy"))) // len(feeds))
    # Behind the attention of the second layer there is no more than behind that of the first.
    assert all(second <= first for first, second in zip(counts[1:4], counts[5:], strict=True))
    walk.advance([model.graph.outputs[0]])
    assert len(list(tmp_path.glob("*.npy"))) == len(feeds)


MLP = """
    u = MatMul (x, w_up)
    a = Relu (u)
    d = MatMul (a, w_down)
    y = Add (x, d)
"""


def _mlp(reads: list[str]) -> tuple[ir.Model, dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(4)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("w_up", (6, 8)), ("w_down", (8, 6)))
    }
    model = hand_made("float[B,S,6] x", "float[B,S,6] y", MLP, weights)
    for name, value in model.graph.initializers.items():
        value.const_value = _recorded(name, weights, reads)
    return model, weights


def _recorded(name: str, weights: Mapping[str, npt.NDArray[np.float32]], reads: list[str]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        reads.append(name)
        return ir.Tensor(weights[name], name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(weights[name].shape), name=name)


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def test_weights_are_read_when_their_part_runs(tmp_path: Path) -> None:
    reads: list[str] = []
    model, weights = _mlp(reads)
    x = np.random.default_rng(5).standard_normal((1, 3, 6)).astype(np.float32)
    walk = Walk(model, [{"x": x}], tmp_path)
    assert reads == []
    walk.advance([_value(model, "a")])
    assert reads == ["w_up"]
    # Until its part runs, a weight may be changed.
    weights["w_down"] = -weights["w_down"]
    walk.advance([_value(model, "y")])
    assert reads == ["w_up", "w_down"]
    expected = x + np.maximum(x @ weights["w_up"], 0) @ weights["w_down"]
    np.testing.assert_allclose(next(walk.read(_value(model, "y"))), expected, rtol=1e-5, atol=1e-5)


def test_what_the_walk_has_passed_is_gone(tmp_path: Path) -> None:
    model, _ = _mlp([])
    x = np.ones((1, 3, 6), np.float32)
    walk = Walk(model, [{"x": x}], tmp_path)
    walk.advance([_value(model, "a")])
    walk.advance([_value(model, "y")])
    with pytest.raises(KeyError):
        next(walk.read(_value(model, "a")))
    assert [walk.passed(_value(model, name)) for name in ("a", "y")] == [True, False]


def test_a_walk_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model, feeds = _decoder()
    before = [(node.op_type, [value and value.name for value in node.inputs]) for node in model.graph]
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    walk = Walk(model, feeds[:1], tmp_path)
    walk.advance([find_stops(model, _linears(model))[5].value])
    assert [(node.op_type, [value and value.name for value in node.inputs]) for node in model.graph] == before
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == names
