"""The overview of graphs: blocks by hand-made names, and what a bundle's graphs are known to hold."""

from __future__ import annotations

import io
from pathlib import Path

import onnx
import pytest
from onnx import helper
from PIL import Image
from rich.console import Console

from qavp_export import plots
from qavp_export.errors import BundleError
from qavp_export.inspect.drawing import draw_graph, graph_tree
from qavp_export.inspect.graph import Block, Overview, blocks_of, overview
from qavp_export.manifest import Manifest


def _nodes(*names: str) -> list[onnx.NodeProto]:
    """Nodes of these names, whose last part is the operator."""
    return [helper.make_node(name.rpartition("/")[2], [], [], name) for name in names]


def _text(*parts: Overview) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for part in parts:
        console.print(graph_tree(part))
    return out.getvalue()


def test_layers_alike_are_one_block_whatever_stands_between_them() -> None:
    names = []
    for layer, kind in enumerate(["Tanh", "Relu", "Tanh", "Tanh"]):
        names += [f"/model/layers.{layer}/mlp/up/MatMul", f"/model/layers.{layer}/mlp/{kind}"]
    precision = {f"/model/layers.{layer}/mlp/up/MatMul": "w4a4" for layer in range(3)}
    precision["/model/layers.3/mlp/up/MatMul"] = "w8a8"
    found = [(block.name, block.repeated, block.count, block.nodes) for block in blocks_of(_nodes(*names), precision)]
    assert found == [("layers", "0, 2", 2, 4), ("layers", "1", 1, 2), ("layers", "3", 1, 2)]


def test_layers_that_differ_in_helpers_of_the_first_only_are_alike() -> None:
    (block,) = blocks_of(_nodes("/layers.0/attn/Cos", "/layers.0/attn/Attention", "/layers.1/attn/Attention"), {})
    assert (block.repeated, block.count, block.nodes) == ("0-1", 2, 3)
    assert [(inner.name, inner.details) for inner in block.inner] == [("attn", ("Attention",))]


def test_arithmetic_on_shapes_is_not_named() -> None:
    node = helper.make_node
    made = [
        node("Shape", ["x"], ["shape"], "/layers.0/attn/Shape"),
        node("Add", ["shape", "one"], ["longer"], "/layers.0/attn/Add"),
        node("Add", ["x", "longer"], ["y"], "/layers.0/attn/Add_1"),
        node("Add", ["y", "bias"], ["z"], "/layers.1/attn/Add"),
    ]
    (block,) = blocks_of(made, {}, ["x"])
    assert (block.repeated, [inner.details for inner in block.inner]) == ("0-1", [("Add",)])


def test_quantizers_and_rotations_sit_where_they_are() -> None:
    made = _nodes(
        "/model/norm/RMSNormalization",
        "/model/norm/RMSNormalization/TwoLevelScale",
        "/model/norm/RMSNormalization/QuantizeLinear",
        "/model/norm/RMSNormalization/DequantizeLinear",
        "/model/down/MatMul/rotation/MatMul",
        "/model/down/MatMul/weight/Cast",
        "/model/down/MatMul/weight/DequantizeLinear",
        "/model/down/MatMul",
        "/model/down/Add",
        "/rotation/32x32/Constant",
        "/inputs_embeds/rotation/MatMul",
    )
    norm, down, embeds = blocks_of(made, {"/model/down/MatMul": "w4a4"})
    assert (norm.name, norm.kind, norm.details) == ("norm", "quantized", ("RMSNormalization", "Q/DQ of 1 activation"))
    assert (down.name, down.kind) == ("down", "quantized")
    assert down.details == ("down: w4a4", "Hadamard rotation of the input of down", "DQ of 1 weight")
    assert (embeds.kind, embeds.details) == ("rotation", ("Hadamard rotation of inputs_embeds",))


def test_blocks_come_in_the_order_of_computation() -> None:
    made = _nodes(
        "/head/Constant", "/model/tower/layers.0/Relu", "/prune/score/Score", "/model/tower/last/Tanh", "/head/Gemm"
    )
    assert [block.name for block in blocks_of(made, {})] == ["tower/layers", "prune/score", "tower/last", "head"]


def test_vision_of_a_pruned_bundle(best: Path) -> None:
    vision = overview(best, Manifest.read(best))[0]
    assert [(block.name, block.kind) for block in vision.blocks] == [
        ("vision_tower/embeddings", "plain"),
        ("vision_tower/pre_layrnorm", "plain"),
        ("vision_tower/encoder/layers", "plain"),
        ("multi_modal_projector", "plain"),
        ("prune/semantic", "prune"),
        ("prune/score", "prune"),
        ("prune/select", "prune"),
    ]
    # Of three layers the second-last feeds the projector.
    assert [(block.repeated, block.count) for block in vision.blocks if block.inner] == [("0-1", 2)]
    assert vision.outputs == ("image_features [batch, 7, 96]", "kept_indices [batch, 7]")
    graph = onnx.load(best / "vision_encoder" / "model.onnx", load_external_data=False).graph
    assert vision.nodes == len(graph.node) >= sum(block.nodes for block in vision.blocks)


def test_decoder_of_a_quantized_bundle(best: Path) -> None:
    decoder = overview(best, Manifest.read(best))[2]
    (layers,) = (block for block in decoder.blocks if block.inner)
    assert (layers.name, layers.repeated, layers.count, layers.kind) == ("layers", "0-1", 2, "quantized")
    inner = {block.name: block.details for block in layers.inner}
    assert inner["attn"][0] == "q_proj, k_proj, v_proj, o_proj: w4a4"
    assert "Hadamard rotation of the input of o_proj" in inner["attn"]
    assert "Q/DQ of 1 activation, DQ of 4 weights" in inner["attn"]
    assert inner["mlp"][0] == "gate_proj, up_proj, down_proj: w4a4"
    assert inner["input_layernorm"] == ("RMSNormalization", "Q/DQ of 1 activation")
    ends = [(block.name, block.kind) for block in decoder.blocks if block.name in ("inputs_embeds", "lm_head")]
    assert ends == [("inputs_embeds", "rotation"), ("lm_head", "quantized")]
    assert decoder.inputs[-1] == "past_key_values.* [batch, 2, past, 16] x4"


def test_a_dense_bundle_has_no_pruning_and_no_quantizers(dense: Path) -> None:
    parts = overview(dense, Manifest.read(dense))
    assert {block.kind for part in parts for block in part.blocks} == {"plain"}


def test_text_and_picture_say_the_same(best: Path) -> None:
    parts = overview(best, Manifest.read(best))
    lines, figure = _text(*parts), draw_graph(parts, "title $x$")
    drawn = [found.get_text() for found in figure.axes[0].texts]
    for words in ("layers 0-1  (x2)", "prune/score", "lm_head", "q_proj, k_proj, v_proj, o_proj: w4a4"):
        assert words in lines
        assert words in drawn
    assert Image.open(io.BytesIO(plots.render(figure, "png"))).width > 1500
    assert plots.render(figure, "svg") == plots.render(draw_graph(parts, "title $x$"), "svg")


def test_nothing_is_drawn_over_another_box_or_beyond_the_edge(best: Path) -> None:
    figure = draw_graph(overview(best, Manifest.read(best)), "title")
    figure.canvas.draw()
    boxes = [patch.get_window_extent() for patch in figure.axes[0].patches]
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            # A later box lies inside, or apart.
            assert not one.overlaps(other) or (one.contains(other.x0, other.y0) and one.contains(other.x1, other.y1))
    frame = figure.bbox
    for text in (found.get_window_extent() for found in figure.axes[0].texts if found.get_text()):
        assert frame.contains(text.x0, text.y0)
        assert frame.contains(text.x1, text.y1)


def test_brackets_in_names_are_no_markup() -> None:
    lines = _text(Overview("[red]", 1, ("x [1]",), (), (Block("[b]", "plain", 1, ("[/b]",)),)))
    for words in ("[red]", "x [1]", "[b]", "[/b]"):
        assert words in lines


def test_missing_and_damaged_graphs_are_said(best: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(best)
    with pytest.raises(BundleError, match="is missing"):
        overview(tmp_path, manifest)
    (tmp_path / "vision_encoder").mkdir()
    (tmp_path / "vision_encoder" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="is no ONNX graph"):
        overview(tmp_path, manifest)
