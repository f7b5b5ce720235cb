"""Decoders of every kind, from the traced graph: greedy tokens against transformers; lowered attention."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qavp_export.errors import CheckpointError
from qavp_export.families import FAMILIES, Plan
from qavp_export.tracing import build_skeleton, trace
from tests.engines.cached_decoders import check_lowered
from tests.families.harness import Array, Runner, open_graph, transformers_answer
from tests.models.decoders import VARIANTS, random_variant, variant_config

STEPS = 12


@cache
def _traced(name: str) -> tuple[Any, ir.Model, Plan]:
    """Traces the decoder of a variant alone; returns the variant's random model too."""
    model = random_variant(name)
    family = FAMILIES["llava"]
    plan = family.plan(model.config)
    skeleton, mode = build_skeleton(model.config)
    modules = {id(module): name for name, module in skeleton.named_modules()}
    with mode:
        request = trace._decoder_request(family.decoder(skeleton), plan, family.decoder_inputs(plan))

    def weight(name: str, _: tuple[int, ...]) -> ir.TensorProtocol:
        module, leaf = name.rsplit(".", 1)
        return ir.tensor(getattr(model.get_submodule(module), leaf).detach().numpy(), name=name)

    return model, trace._trace(request, mode, modules, weight), plan


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_equal_transformers(name: str) -> None:
    model, graph, plan = _traced(name)
    rng = np.random.default_rng(5)
    # 38 and 31 tokens: longer than windows and original lengths, or reaching them while the answer grows.
    ids = rng.integers(5, plan.vocab_size, (2, 38))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    table = model.get_input_embeddings()
    never = (plan.image_token_id, model.generation_config.eos_token_id)
    runner = Runner({"decoder": open_graph(graph)}, plan, never)

    def embed(tokens: Array) -> Array:
        return table(torch.from_numpy(tokens)).detach().numpy()

    inputs = {"inputs_embeds": table(torch.from_numpy(ids)), "attention_mask": torch.from_numpy(mask)}
    expected = transformers_answer(model, STEPS, plan.image_token_id, **inputs)
    runner.decode(embed(ids), mask, embed, STEPS).check(expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_lowered_attention_equals_the_canonical_graph(name: str, tmp_path: Path) -> None:
    _, graph, plan = _traced(name)
    check_lowered(graph, plan, tmp_path, one_graph=True)


# What scaled rotary embeddings reach. `max_position_embeddings` is 32 for the first two, and 128.
REACH = {"linear RoPE": 128, "dynamic RoPE": 128, "yarn RoPE": 128, "llama3 RoPE": 128, "llama, biases, tied, MQA": 128}


@pytest.mark.parametrize("name", REACH)
def test_a_scaled_rotary_embedding_lengthens_the_context(name: str) -> None:
    assert FAMILIES["llava"].plan(variant_config(name)).context_length == REACH[name]


def test_rotary_embeddings_that_cannot_be_traced_are_refused() -> None:
    config = variant_config("llama3 RoPE")
    config.text_config.rope_parameters["rope_type"] = "longrope"
    with pytest.raises(CheckpointError, match=r"type 'longrope', which cannot be exported; supported: default, linear"):
        FAMILIES["llava"].plan(config)
