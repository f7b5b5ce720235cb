"""Checkpoints whose decoder was quantized by another tool, and the float checkpoints that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from qavp_export.checkpoint import Checkpoint
from qavp_export.prequantized import ModuleTensors, find_layout
from tests.prequantized.packers import Quantized, Tensors, compress, pack_awq, pack_gptq, quantize

IGNORED = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


def gptq_settings(**changes: Any) -> dict[str, Any]:
    """What AutoGPTQ writes, and GPTQModel with its `checkpoint_format` and `meta`."""
    extra = {"damp_percent": 0.01, "static_groups": False, "true_sequential": True, "lm_head": False}
    return GPTQ | extra | changes


def awq_settings(**changes: Any) -> dict[str, Any]:
    """What AutoAWQ writes."""
    return AWQ | {"modules_to_not_convert": ["vision_tower", "multi_modal_projector"]} | changes


def compressed_settings(
    stored: str = "pack-quantized", weights: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """What llm-compressor writes."""
    full = WEIGHTS | {"actorder": None, "block_structure": None, "observer": "minmax"} | dict(weights or {})
    group = {"targets": ["Linear"], "weights": full, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": IGNORED,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    } | changes


@dataclass(frozen=True)
class Tool:
    """A way to quantize a checkpoint.

    Attributes:
        settings: The `quantization_config`.
        pack: Writes one weight.
        symmetric: Of the weights.
        bits: Of the weights.
        group_size: Of the weights; -1 for whole channels.
    """

    settings: dict[str, Any]
    pack: Callable[[Quantized], Tensors]
    symmetric: bool = True
    bits: int = 4
    group_size: int = 32


TOOLS = {
    "compressed-tensors W4A16": Tool(compressed_settings(), lambda q: compress(q, "pack-quantized")),
    "compressed-tensors W4A16 asymmetric": Tool(
        compressed_settings(weights={"symmetric": False}), lambda q: compress(q, "pack-quantized"), symmetric=False
    ),
    "compressed-tensors W8A8": Tool(
        compressed_settings("int-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}),
        lambda q: compress(q, "int-quantized"),
        bits=8,
        group_size=-1,
    ),
    "gptq": Tool(gptq_settings(), pack_gptq),
    "gptq v2, 8 bits": Tool(
        gptq_settings(checkpoint_format="gptq_v2", bits=8, group_size=-1),
        lambda q: pack_gptq(q, version=2),
        bits=8,
        group_size=-1,
    ),
    "awq": Tool(awq_settings(), pack_awq, symmetric=False),
}


def write_quantized(source: Path, tool: Tool, folder: Path, reference: Path) -> None:
    """Quantizes the decoder's linear layers of a LLaVA checkpoint; everything else stays as it is.

    Args:
        source: A float checkpoint in one file.
        tool: How to quantize.
        folder: Gets the quantized checkpoint.
        reference: Gets a checkpoint of the same values, as floats.
    """
    packed: Tensors = {}
    floats: Tensors = {}
    for name, tensor in safetensors.torch.load_file(source / "model.safetensors").items():
        if "language_model" not in name or ".layers." not in name or tensor.dim() != 2:
            packed[name] = floats[name] = tensor
            continue
        q = quantize(tensor.float().numpy(), bits=tool.bits, group_size=tool.group_size, symmetric=tool.symmetric)
        floats[name] = torch.from_numpy(q.weight())
        packed |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts(tool.pack(q)).items()}
    for target, tensors in ((folder, packed), (reference, floats)):
        shutil.copytree(source, target)
        safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder, tool.settings)


def parts(tensors: Tensors) -> Tensors:
    """Returns tensors as safetensors needs them: contiguous."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def set_quantization(folder: Path, settings: object, inside: str | None = None) -> None:
    """Writes a `quantization_config` into config.json, or into one of its sub-configurations."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if inside is None else config[inside])["quantization_config"] = settings
    path.write_text(json.dumps(config))


def open_module(folder: Path, tensors: Tensors) -> ModuleTensors:
    """Writes a checkpoint of one module, `layer`, and opens it."""
    (folder / "config.json").write_text("{}")
    named = {f"layer.{name}": value for name, value in parts(tensors).items()}
    safetensors.torch.save_file(named, folder / "model.safetensors")
    return ModuleTensors(Checkpoint.open(folder), "layer")


def read_weight(folder: Path, settings: Mapping[str, Any], tensors: Tensors, shape: tuple[int, ...]) -> Any:
    """Writes one quantized weight and reads it with the layout that the settings describe."""
    layout = find_layout({"quantization_config": settings})
    if layout is None:
        raise AssertionError("the settings describe no quantized weights")
    return layout.read(open_module(folder, tensors), shape)
