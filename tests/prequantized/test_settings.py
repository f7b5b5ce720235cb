"""`quantization_config`: what real tools write is understood, and what is not supported is one clear line."""

from __future__ import annotations

from typing import Any

import pytest

from qavp_export.errors import CheckpointError
from qavp_export.prequantized import find_layout
from tests.prequantized.checkpoints import IGNORED, awq_settings, compressed_settings, gptq_settings

DYNAMIC_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _describe(settings: object) -> dict[str, Any] | None:
    layout = find_layout({"model_type": "llava", "quantization_config": settings})
    return None if layout is None else layout.describe()


def _group(**fields: Any) -> dict[str, Any]:
    group: dict[str, Any] = compressed_settings()["config_groups"]["group_0"]
    return group | fields


def _description(method: str, bits: int = 4, group_size: int = 32, symmetric: bool = True) -> dict[str, Any]:
    return {"method": method, "bits": bits, "group_size": group_size, "symmetric": symmetric, "activations": None}


# llm-compressor, W8A8 with static activations and an 8-bit cache.
W8A8 = compressed_settings(
    "int-quantized",
    config_groups={
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": DYNAMIC_TOKEN,
            "output_activations": None,
        }
    },
    kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
)

SUPPORTED = {
    "AutoGPTQ": (gptq_settings(), _description("gptq")),
    "AutoGPTQ, asymmetric, act order": (gptq_settings(sym=False, desc_act=True), _description("gptq", symmetric=False)),
    "GPTQModel": (
        gptq_settings(checkpoint_format="gptq_v2", pack_dtype="int32", meta={"quantizer": ["gptqmodel:2.2.0"]}),
        _description("gptq"),
    ),
    "GPTQModel that leaves modules alone": (
        gptq_settings(dynamic={"-:.*vision_tower.*": {}, "-:.*mlp.*": {"bits": 8}}),
        _description("gptq"),
    ),
    "GPTQModel that repeats a setting": (gptq_settings(dynamic={"+:.*mlp.*": {"bits": 4}}), _description("gptq")),
    "AutoAWQ": (awq_settings(group_size=128), _description("awq", 4, 128, symmetric=False)),
    "AutoAWQ, upper case": (awq_settings(version="GEMM"), _description("awq", symmetric=False)),
    "GPTQModel's AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False, "checkpoint_format": "gemm"},
        _description("awq"),
    ),
    "W4A16": (compressed_settings(), _description("compressed-tensors")),
    "W4A16, format by group": (
        compressed_settings("mixed-precision", config_groups={"group_0": _group(format="pack-quantized")}),
        _description("compressed-tensors"),
    ),
    "W4A16, two groups alike": (
        compressed_settings(config_groups={"group_0": _group(), "group_1": _group(targets=["re:.*mlp.*"])}),
        _description("compressed-tensors"),
    ),
    "sparsity and transforms that are empty": (
        compressed_settings(sparsity_config={}, transform_config={}, version="0.15.0"),
        _description("compressed-tensors"),
    ),
    "W4A4": (
        compressed_settings(config_groups={"group_0": _group(input_activations=DYNAMIC_TOKEN | {"num_bits": 4})}),
        _description("compressed-tensors") | {"activations": "inputs int4 per token, dynamic"},
    ),
    "W8A8": (
        W8A8,
        _description("compressed-tensors", 8, -1)
        | {"activations": "inputs int8 per token, dynamic; KV cache float8 per tensor, static"},
    ),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_tools_write(name: str) -> None:
    settings, expected = SUPPORTED[name]
    assert _describe(settings) == expected


@pytest.mark.parametrize(
    "settings",
    [
        None,
        compressed_settings("dense"),
        compressed_settings(config_groups={"group_0": _group(weights=None, input_activations=DYNAMIC_TOKEN)}),
    ],
)
def test_weights_that_are_floats(settings: object) -> None:
    assert _describe(settings) is None


def test_settings_of_the_text_model_alone() -> None:
    layout = find_layout({"model_type": "llava", "text_config": {"quantization_config": gptq_settings(bits=8)}})
    assert layout is not None
    assert layout.describe() == _description("gptq", bits=8)
    assert find_layout({"text_config": {}}) is None
    assert find_layout({"text_config": "llama"}) is None


def _without(settings: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != key}


REFUSED = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        'has quant_method "bitsandbytes", which is not supported (supported: "awq", "compressed-tensors", "gptq")',
    ),
    "fp8": ({"quant_method": "fp8"}, 'quant_method "fp8"'),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, 'quant_method "auto-round"'),
    "no method": ({"bits": 4}, "has no quant_method"),
    "not an object": ([4], "is a list instead of an object"),
    "text": ("gptq", "is a str instead of an object"),
    "method of another type": ({"quant_method": ["gptq"]}, 'has quant_method ["gptq"]'),
    "gptq 3 bits": (gptq_settings(bits=3), "has bits 3, which is not supported (supported: 4, 8)"),
    "gptq 2 bits": (gptq_settings(bits=2), "has bits 2"),
    "bits as text": (gptq_settings(bits="4"), 'has bits "4"'),
    "bits as truth": (gptq_settings(bits=True), "has bits true"),
    "bits as float": (gptq_settings(bits=4.0), "has bits 4.0"),
    "no bits": (_without(gptq_settings(), "bits"), "has no bits"),
    "gptq marlin": (gptq_settings(checkpoint_format="marlin"), 'has checkpoint_format "marlin"'),
    "old marlin": (gptq_settings(is_marlin_format=True), "has is_marlin_format"),
    "gptq groups of 0": (gptq_settings(group_size=0), "has group_size 0, but it must be a positive number"),
    "gptq groups of -2": (gptq_settings(group_size=-2), "has group_size -2"),
    "no groups": (_without(gptq_settings(), "group_size"), "has group_size null"),
    "gptq words of 8 bits": (gptq_settings(pack_dtype="int8"), 'has pack_dtype "int8"'),
    "gptq rotation": (gptq_settings(rotation="hadamard"), "has rotation"),
    "gptq adapter": (gptq_settings(adapter={"name": "lora"}), "has adapter"),
    "gptq mixed": (
        gptq_settings(dynamic={"+:.*down_proj": {"bits": 8}}),
        "has dynamic +:.*down_proj, which changes bits for some modules",
    ),
    "gptq dynamic list": (gptq_settings(dynamic=["+:a"]), "has a dynamic that is not an object"),
    "gptq dynamic number": (gptq_settings(dynamic={"+:a": 4}), "has dynamic +:a, which is not an object"),
    "awq gemv": (awq_settings(version="gemv"), 'has version "gemv", which is not supported (supported: "gemm")'),
    "awq marlin": (awq_settings(version="marlin"), 'has version "marlin"'),
    "awq of llm-awq": (awq_settings(backend="llm-awq"), "has backend llm-awq"),
    "awq 8 bits": (awq_settings(bits=8), "has bits 8"),
    "awq zero point of another type": (awq_settings(zero_point="yes"), 'has zero_point "yes"'),
    "no config groups": (compressed_settings(config_groups=None), "has no config_groups"),
    "preset": (compressed_settings(config_groups={"W4A16": ["Linear"]}), "has no config_groups"),
    "no format": (_without(compressed_settings(), "format"), "has no format"),
    "nvfp4": (compressed_settings("nvfp4-pack-quantized"), 'has format "nvfp4-pack-quantized"'),
    "marlin-24": (compressed_settings("marlin-24"), 'has format "marlin-24"'),
    "float weights": (compressed_settings("naive-quantized", {"type": "float", "num_bits": 8}), 'has type "float"'),
    "3 bits": (compressed_settings(weights={"num_bits": 3}), "has num_bits 3"),
    "blocks": (compressed_settings("int-quantized", {"strategy": "block"}), 'has strategy "block"'),
    "one scale, packed": (compressed_settings(weights={"strategy": "tensor"}), 'has strategy "tensor"'),
    "dynamic weights": (compressed_settings(weights={"dynamic": True}), "has dynamic true"),
    "no group size": (compressed_settings(weights={"group_size": None}), "has group_size null"),
    "act order in bytes": (
        compressed_settings("int-quantized", {"actorder": "group"}),
        "has actorder group, which is supported only for format pack-quantized",
    ),
    "mixed groups": (
        compressed_settings(
            config_groups={"group_0": _group(), "group_1": _group(weights={**_group()["weights"], "num_bits": 8})}
        ),
        "has config_groups that quantize weights in different ways",
    ),
    "weights as a list": (compressed_settings(config_groups={"group_0": _group(weights=[4])}), "weights are not an"),
    "sparse": (compressed_settings(sparsity_config={"format": "sparse-24-bitmask"}), 'has format "sparse-24-bitmask"'),
    "sparse, but not said how": (compressed_settings(sparsity_config=["2:4"]), "has a sparsity_config that is not"),
    "transforms": (compressed_settings(transform_config={"config_groups": {"R4": {}}}), "has transform_config"),
    "control characters": ({"quant_method": "a\nb" + "x" * 1000}, "has quant_method"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    settings, expected = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        _describe(settings)
    message = str(caught.value)
    assert message.startswith("quantization_config in config.json ")
    assert expected in message
    assert message.endswith("or use its original checkpoint")
    assert "\n" not in message
    assert len(message) < 700
    assert caught.value.exit_code == 2


def test_ignore_lists_do_not_matter() -> None:
    # Which modules are quantized shows in the tensors; tools spell the lists by their own module names.
    for ignore in (IGNORED, [], None, ["lm_head", "model.vision_tower"]):
        assert _describe(compressed_settings(ignore=ignore)) == _description("compressed-tensors")
