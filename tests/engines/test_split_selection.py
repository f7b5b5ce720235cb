"""Diverse tokens selected in a graph of their own: behind the encoder's, it gives what the canonical graph gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from transformers import AutoConfig

from qavp_export import pipeline
from qavp_export.engines.ort.lowering.capabilities import CPU, CUDA
from qavp_export.engines.ort.lowering.selection import split_selection
from qavp_export.engines.ort.lowering.vision import lower_vision
from qavp_export.engines.ort.lowering.weights import Lowered
from qavp_export.engines.ort.session import GraphPipeline
from qavp_export.families import FAMILIES
from qavp_export.passes import FoldWeightTransposes, PruneVisionTokens
from qavp_export.passes.hybrid_score import SCORE
from qavp_export.passes.store_half import StoreHalf
from qavp_export.recipe import make_recipe
from qavp_export.runtime.tiles import count_tiles, pack_tiles
from qavp_export.settings import settle
from tests.engines.lowered import open_canonical, open_lowered, run, write_canonical
from tests.families.harness import traced_vision
from tests.models.llava_next import SIDE, make_llava_next, make_llava_onevision
from tests.models.tiny import TinySpec, make_llava

Array = npt.NDArray[Any]

COMPONENT = "vision_encoder"
MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "llava": lambda folder: make_llava(folder, TinySpec()),
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
}
# Height and width of an image of 3 tiles, padded.
SIZE = (50, 90)
# Float sums in another order; of the largest value.
ROUNDING = 2e-6


@dataclass(frozen=True)
class _Traced:
    """A tiny checkpoint, and its vision encoder with weights."""

    folder: Path
    graph: ir.Model
    feeds: Mapping[str, Array]

    def pruned(self, **fields: Any) -> ir.Model:
        """Returns the encoder as a recipe prunes it."""
        config = AutoConfig.from_pretrained(self.folder)
        family, graph = FAMILIES[config.model_type], self.graph.clone()
        pipeline.prune({COMPONENT: graph}, settle(make_recipe("none", fields), family, family.plan(config)))
        return graph


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], _Traced]:
    """Traces a model's vision encoder, once; its inputs are several images, or one of several tiles."""

    @cache
    def make(name: str) -> _Traced:
        folder = MAKERS[name](tmp_path_factory.mktemp("split") / name)
        reference, graph = traced_vision(folder, FAMILIES[name])
        packing, count = {}, 3
        if name != "llava":
            settings = FAMILIES[name].layout_settings(reference.config)
            packing, count = pack_tiles(SIZE, settings, newlines=False), count_tiles(SIZE, settings)
        pixels = np.random.default_rng(1).standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)
        return _Traced(folder, graph, {"pixel_values": pixels, **packing})

    return make


def _lower(canonical: ir.Model) -> tuple[Lowered, Lowered]:
    parts = split_selection(canonical)
    assert parts is not None
    return lower_vision(parts[0], "fp32", CUDA), lower_vision(parts[1], "fp32", CPU)


def _store(graph: ir.Model, bundle: Path) -> ir.Model:
    """Writes an encoder as a bundle has it: matrices in 16 bits, which they came in."""
    matrices = {name: ir.DataType.FLOAT16 for name, value in graph.graph.initializers.items() if _is_matrix(value)}
    StoreHalf(matrices)(graph)
    return write_canonical(graph, bundle, COMPONENT)


def _is_matrix(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT and value.shape is not None and len(value.shape) >= 2


def _open(lowered: tuple[Lowered, Lowered], bundle: Path) -> GraphPipeline:
    names = ("encoder", "selection")
    return GraphPipeline([open_lowered(part, bundle, name) for part, name in zip(lowered, names, strict=True)])


def _check(pipeline: GraphPipeline, bundle: Path, feeds: Mapping[str, Array]) -> Array:
    """Runs the graphs and the canonical one, and returns the indices of kept tokens."""
    expected, found = run(open_canonical(bundle, COMPONENT), feeds), run(pipeline, feeds)
    np.testing.assert_array_equal(found["kept_indices"], expected["kept_indices"])
    features = expected["image_features"]
    np.testing.assert_allclose(found["image_features"], features, rtol=0, atol=ROUNDING * np.abs(features).max())
    return found["kept_indices"]


def _operators(model: ir.Model) -> Iterator[str]:
    for node in model.graph.all_nodes():
        yield node.op_type
    for function in model.functions.values():
        for node in function.all_nodes():
            yield node.op_type


@pytest.mark.parametrize("select", ["dpp", "maxmin"])
@pytest.mark.parametrize("name", MAKERS)
def test_both_graphs_give_what_the_canonical_one_gives(
    traced: Callable[[str], _Traced], tmp_path: Path, name: str, select: str
) -> None:
    model = traced(name)
    canonical = _store(model.pruned(select=select, keep_range=(0.1, 0.9)), tmp_path)
    encoder, selection = _lower(canonical)
    assert "Loop" in set(_operators(canonical))
    assert "Loop" not in set(_operators(encoder.model))
    assert {"Loop", "MatMulInteger"} <= set(_operators(selection.model))
    assert not selection.weights
    assert {plan.form for plan in encoder.weights} == {"stored", "widened"}
    # The number of tokens to keep is an input of the selection alone, and pixels are one of the encoder.
    inputs = [[value.name for value in part.model.graph.inputs] for part in (encoder, selection)]
    assert inputs[0] == [value.name for value in canonical.graph.inputs][:-1]
    assert inputs[1] == ["keep_tokens", *(value.name for value in encoder.model.graph.outputs)]
    graphs = _open((encoder, selection), tmp_path)
    assert graphs.inputs == {value.name for value in canonical.graph.inputs}
    for count in (5, 11):
        kept = _check(graphs, tmp_path, {**model.feeds, "keep_tokens": np.array([count])})
        assert kept.shape == (3 if name == "llava" else 1, count)


def test_a_number_of_tokens_that_is_fixed(traced: Callable[[str], _Traced], tmp_path: Path) -> None:
    model = traced("llava")
    lowered = _lower(_store(model.pruned(select="dpp", keep=0.3), tmp_path))
    kept = _check(_open(lowered, tmp_path), tmp_path, model.feeds)
    assert kept.shape == (3, 8)
    # Each image's own tokens.
    assert len({tuple(row) for row in kept.tolist()}) == 3


def test_weights_behind_the_selection_go_with_it(traced: Callable[[str], _Traced], tmp_path: Path) -> None:
    model = traced("llava")
    graph = model.graph.clone()
    FoldWeightTransposes()(graph)
    projector = next(node for node in graph.graph if node.op_type == "MatMul" and "projector" in str(node.name))
    assert projector.inputs[0] is not None
    PruneVisionTokens(at=str(projector.inputs[0].name), tokens=7, select="dpp")(graph)
    canonical = _store(graph, tmp_path)
    encoder, selection = _lower(canonical)
    # Two matrices, which are widened, and their biases.
    assert sorted(plan.form for plan in selection.weights) == ["stored", "stored", "widened", "widened"]
    assert not {plan.name for plan in selection.weights} & {plan.name for plan in encoder.weights}
    assert _check(_open((encoder, selection), tmp_path), tmp_path, model.feeds).shape == (3, 7)
    # The encoder's layers alone are rounded.
    parts = split_selection(canonical)
    assert parts is not None
    rounded = lower_vision(parts[0], "w8a8", CUDA).precision
    assert rounded
    assert not [name for name in rounded if "projector" in name]


def test_an_output_that_depends_on_no_selection_stays_with_the_encoder(
    traced: Callable[[str], _Traced], tmp_path: Path
) -> None:
    model = traced("llava")
    graph = model.pruned(select="maxmin", keep=0.3)
    # One that the selection does not read, and one that it does.
    node = ir.node("Shape", [graph.graph.inputs[0]], name="/sizes")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "sizes", ir.DataType.INT64, ir.Shape([4])
    graph.graph.append(node)
    score = ir.convenience.create_value_mapping(graph.graph)[SCORE]
    graph.graph.outputs.extend([node.outputs[0], score])
    encoder, selection = _lower(_store(graph, tmp_path))
    assert [value.name for value in encoder.model.graph.outputs] == ["sizes", SCORE, "image_features_unpruned"]
    assert [value.name for value in selection.model.graph.outputs] == ["image_features", "kept_indices"]
    graphs = _open((encoder, selection), tmp_path)
    _check(graphs, tmp_path, model.feeds)
    assert run(graphs, model.feeds)["sizes"].tolist() == [3, 3, SIDE, SIDE]


@pytest.mark.parametrize("fields", [{"select": "topk", "keep": 0.3}, {"keep": 1.0}], ids=["topk", "all"])
def test_no_other_encoder_is_cut(traced: Callable[[str], _Traced], fields: dict[str, Any]) -> None:
    assert split_selection(traced("llava").pruned(**fields)) is None


def test_the_canonical_graph_is_not_changed(traced: Callable[[str], _Traced]) -> None:
    canonical = traced("llava").pruned(select="dpp", keep=0.3)
    before = ir.to_proto(canonical)
    assert split_selection(canonical) is not None
    assert ir.to_proto(canonical) == before
