"""Tests share traces: only of modules that differ in nothing that a trace depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig

from qavp_export.families import FAMILIES
from qavp_export.tracing import build_skeleton, trace, trace_components
from tests.models import traces
from tests.models.tiny import TinySpec, make_llava
from tests.models.traces import Tracer

PARTS = ("vision_encoder", "embedding", "decoder")
SPEC = TinySpec(layers=1, vision_layers=2)


def _nothing(_: Any) -> None:
    pass


def _digests(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None] = _nothing) -> dict[str, str]:
    config = AutoConfig.from_pretrained(folder)
    change(config)
    skeleton, mode = build_skeleton(config)
    found: list[str] = []

    def keep(request: Any, _mode: Any, modules: Any, _weights: Any) -> None:
        found.append(traces._digest(request, modules))

    monkeypatch.setattr(trace, "_trace", keep)
    family = FAMILIES["llava"]
    trace_components(family, family.plan(config), skeleton, mode, _no_weight, lambda *_: None)
    return dict(zip(PARTS, found, strict=True))


def _no_weight(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    raise AssertionError(f"{name} {shape} was asked for")


def test_checkpoints_of_one_configuration_share_their_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (make_llava(tmp_path / str(seed), dataclasses.replace(SPEC, seed=seed)) for seed in (0, 1))
    assert _digests(one, monkeypatch) == _digests(other, monkeypatch)


def _set(section: str, **fields: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        for name, value in fields.items():
            setattr(getattr(config, section) if section else config, name, value)

    return change


CHANGES: dict[str, tuple[Callable[[Any], None], set[str]]] = {
    "placeholder": (_set("", image_token_id=7), {"vision_encoder", "embedding"}),
    "feature layer": (_set("", vision_feature_layer=-1), {"vision_encoder"}),
    "feature selection": (_set("", vision_feature_select_strategy="full"), {"vision_encoder"}),
    "vision epsilon": (_set("vision_config", layer_norm_eps=1e-3), {"vision_encoder"}),
    "vision activation": (_set("vision_config", hidden_act="relu"), {"vision_encoder"}),
    # LLaVA's vision module holds the whole model.
    "epsilon": (_set("text_config", rms_norm_eps=1e-3), {"vision_encoder", "decoder"}),
    "bias": (_set("text_config", mlp_bias=True), {"vision_encoder", "decoder"}),
    "heads": (_set("text_config", num_key_value_heads=3), {"vision_encoder", "decoder"}),
    "activation": (_set("text_config", hidden_act="relu"), {"vision_encoder", "decoder"}),
    "RoPE": (
        _set("text_config", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        {"vision_encoder", "decoder"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_traced_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = make_llava(tmp_path / "model", SPEC)
    change, differ = CHANGES[name]
    plain, changed = _digests(folder, monkeypatch), _digests(folder, monkeypatch, change)
    assert {part for part in PARTS if plain[part] != changed[part]} == differ


def test_tied_weights_are_traced_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, tied = (
        _digests(make_llava(tmp_path / str(tied), dataclasses.replace(SPEC, tied=tied)), monkeypatch)
        for tied in (False, True)
    )
    assert apart["decoder"] != tied["decoder"]


def test_a_reused_graph_is_the_traced_one(trace_anew: Tracer) -> None:
    module = _Affine()
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module.linear = torch.nn.Linear(3, 2)
        sample = torch.zeros(2, 3)
    request = trace._Request(module, (sample,), ({0: "batch"},), {"x": ("batch", 3)}, {"y": ("batch", 3)})
    names = {id(part): name for name, part in module.named_modules()}

    def weight(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        return ir.tensor(np.full(shape, len(name), np.float32), name=name)

    expected = ir.to_proto(trace_anew(request, mode, names, weight)).SerializeToString()
    # Traced and stored, and read again.
    for _ in range(2):
        assert ir.to_proto(trace._trace(request, mode, names, weight)).SerializeToString() == expected


class _Affine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0).reshape(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(self.linear(x) @ self.table.T, (3,))
