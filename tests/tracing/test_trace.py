"""Tracing on fake tensors: names, shapes, and no weight read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qavp_export.families import FAMILIES, GraphInput, Plan
from qavp_export.families.base import BATCH, SEQUENCE
from qavp_export.families.llava import Llava
from qavp_export.tracing import PARAMETER, build_skeleton, trace_components
from tests.models.tiny import TinySpec, make_llava

Graphs = dict[str, ir.Model]


def _unreadable(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    def read() -> NoReturn:
        raise AssertionError(f"{name} was read")

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)


def _trace(folder: Path) -> Graphs:
    config = AutoConfig.from_pretrained(folder)
    family = FAMILIES["llava"]
    skeleton, mode = build_skeleton(config)
    steps: list[tuple[int, int]] = []
    graphs = trace_components(
        family, family.plan(config), skeleton, mode, _unreadable, lambda *step: steps.append(step)
    )
    assert steps == [(0, 3), (1, 3), (2, 3)]
    return graphs


@pytest.fixture(scope="module")
def graphs(tiny_llava: Path) -> Graphs:
    return _trace(tiny_llava)


def _parameters(graph: ir.Model) -> dict[str, str]:
    return {
        name: value.metadata_props[PARAMETER]
        for name, value in graph.graph.initializers.items()
        if PARAMETER in value.metadata_props
    }


def test_nodes_read_like_the_model(graphs: Graphs) -> None:
    names = [str(node.name) for node in graphs["decoder"].graph]
    assert len(names) == len(set(names))
    for name in (
        "/model/layers.0/attn/q_proj/MatMul",
        "/model/layers.1/mlp/down_proj/MatMul",
        "/model/layers.1/attn/Attention",
        "/model/norm/RMSNormalization",
        "/lm_head/MatMul",
    ):
        assert name in names
    vision = [str(node.name) for node in graphs["vision_encoder"].graph]
    assert "/model/vision_tower/encoder/layers.0/attn/q_proj/MatMul" in vision
    assert not any("_empty_nn_module" in name for name in names + vision)


def test_norms_rotary_embeddings_and_attention_stay_whole(graphs: Graphs) -> None:
    kinds = [node.op_type for node in graphs["decoder"].graph]
    assert kinds.count("RMSNormalization") == 5
    assert kinds.count("RotaryEmbedding") == 4
    assert kinds.count("Attention") == 2
    assert "Constant" not in kinds


def test_layers_that_do_not_feed_the_projector_are_gone(graphs: Graphs) -> None:
    parameters = _parameters(graphs["vision_encoder"]).values()
    # vision_feature_layer is -2: of three layers the last is not needed, nor is the final norm.
    assert any(".layers.1." in name for name in parameters)
    assert not any(".layers.2." in name or "post_layernorm" in name for name in parameters)


def test_tied_parameters_keep_the_name_of_their_module(tmp_path: Path) -> None:
    graphs = _trace(make_llava(tmp_path / "tied", TinySpec(tied=True)))
    assert "lm_head.weight" in _parameters(graphs["decoder"]).values()
    assert list(_parameters(graphs["embedding"]).values()) == ["model.language_model.embed_tokens.weight"]


def test_only_parameters_are_fake(tiny_llava: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llava)
    skeleton, _ = build_skeleton(config)
    assert all(isinstance(parameter, torch._subclasses.FakeTensor) for parameter in skeleton.parameters())
    inverse = skeleton.get_buffer("model.language_model.rotary_emb.inv_freq").numpy()
    # RoPE's definition: theta^(-2i/d) for d = 16 channels per head, theta = 10000.
    np.testing.assert_allclose(inverse, 10000.0 ** (-np.arange(0, 16, 2) / 16), rtol=1e-6)
    assert str(config.dtype) == "torch.float16"


def test_module_registration_is_restored(tiny_llava: Path) -> None:
    build_skeleton(AutoConfig.from_pretrained(tiny_llava))
    layer = torch.nn.Linear(2, 2)
    assert not isinstance(layer.weight, torch._subclasses.FakeTensor)


def test_declared_inputs_reach_the_module_in_their_place(tiny_llava: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llava)
    skeleton, mode = build_skeleton(config)
    family = _WithMoreInputs()
    plan = dataclasses.replace(family.plan(config), tower_patches=25)
    graphs = trace_components(family, plan, skeleton, mode, _unreadable, lambda *_: None)
    vision, decoder = graphs["vision_encoder"].graph, graphs["decoder"].graph
    assert [(value.name, str(value.shape)) for value in (*vision.inputs, *vision.outputs)] == [
        ("pixel_values", "[batch,3,40,40]"),
        ("patch_relevance", "[batch,25]"),
        ("image_features", "[batch,25,96]"),
        ("token_relevance", "[batch,25]"),
    ]
    assert [value.name for value in decoder.inputs][:5] == [
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "past_key_values.0.key",
    ]
    assert str(decoder.inputs[3].shape) == "[batch,sequence]"
    assert decoder.inputs[3].uses()


class _WithMoreInputs(Llava):
    """LLaVA whose logits shift by the token's type, and whose tokens count the patches' relevance twice."""

    def decoder_inputs(self, plan: Plan) -> tuple[GraphInput, ...]:
        del plan
        return (GraphInput("token_type_ids", torch.int64, ("batch", "sequence"), (BATCH, SEQUENCE)),)

    def vision_encoder(self, model: Any) -> nn.Module:
        return _Doubled(super().vision_encoder(model))

    def decoder(self, model: Any) -> nn.Module:
        return _Shifted(super().decoder(model))


class _Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor, patch_relevance: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(pixel_values), patch_relevance * 2


class _Shifted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, types: Tensor, past: Any) -> Any:
        logits, present = self.inner(embeds, mask, positions, past)
        return logits + types.unsqueeze(-1), present


def test_shapes_are_static_where_engines_need_them(graphs: Graphs) -> None:
    vision = graphs["vision_encoder"].graph
    assert [str(value.shape) for value in vision.inputs] == ["[batch,3,40,40]"]
    assert [str(value.shape) for value in vision.outputs] == ["[batch,25,96]"]
    decoder = graphs["decoder"].graph
    assert [str(value.shape) for value in decoder.inputs][:4] == [
        "[batch,sequence,96]",
        "[batch,total]",
        "[batch,sequence]",
        "[batch,2,past,16]",
    ]
