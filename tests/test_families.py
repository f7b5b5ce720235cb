"""What a family knows: sizes, names, and what it refuses."""

from __future__ import annotations

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from qavp_export.errors import CheckpointError
from qavp_export.families import FAMILIES, family_for

LLAVA = FAMILIES["llava"]


def _config(**changes: object) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def test_sizes_of_llava_1_5_7b() -> None:
    plan = LLAVA.plan(_config())
    assert (plan.vision_tokens, plan.hidden_size, plan.num_layers, plan.head_dim) == (576, 4096, 32, 128)
    assert (plan.image_token_id, plan.context_length, plan.has_cls_token) == (32000, 4096, True)


def test_keeping_the_cls_token_makes_it_one_of_the_features() -> None:
    plan = LLAVA.plan(_config(vision_feature_select_strategy="full"))
    assert (plan.vision_tokens, plan.has_cls_token) == (577, False)


@pytest.mark.parametrize("model_type", ["blip-9", "", None])
def test_unknown_families_name_the_supported(model_type: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"is not supported; supported: .*llava, llava_next, "):
        family_for(model_type)


@pytest.mark.parametrize(
    ("stored", "parameter"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_every_spelling_of_a_name_is_understood(stored: str, parameter: str) -> None:
    assert LLAVA.parameter_names([stored]) == {parameter: stored}


def test_two_tensors_for_one_parameter_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"both mean lm_head\.weight"):
        LLAVA.parameter_names(["lm_head.weight", "language_model.lm_head.weight"])
