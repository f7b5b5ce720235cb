"""Writes a random LLaVA checkpoint of a published model's shape, in the layout of its Hub repository.

python benchmarks/make_checkpoint.py --shape llava-1.5-7b checkpoint/llava-1.5-7b

Weights are drawn tensor by tensor and streamed to disk, so that a 7B checkpoint needs no more memory than its largest
tensor. The tokenizer is a word list of the right size: enough for an export, not for an answer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

Float16 = npt.NDArray[np.float16]

SHARD_BYTES = 5_000_000_000
# Of a linear weight; norms are ones, biases zeros.
SPREAD = 0.02
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)


@dataclass(frozen=True)
class Shape:
    """The sizes that differ between the models; the vision tower is CLIP-L/336 in all of them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32064


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llava-1b": Shape(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4),  # TinyLlama's decoder
        "llava-1.5-7b": Shape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32),
        "llava-1.5-13b": Shape(hidden=5120, intermediate=13824, layers=40, heads=40, kv_heads=40),
    }
)

# In-memory names of transformers 5 -> names in a repository, for the two styles that Hub repositories use.
STYLES: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType(
    {
        "language_model.model": (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
        "model.language_model": (("model.vision_tower.", "model.vision_tower.vision_model."),),
    }
)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes; must not exist.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(help="Decoder layers, to truncate the model.")] = None,
    style: Annotated[str, typer.Option(help=f"Tensor names: {' or '.join(STYLES)}.")] = "language_model.model",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Writes the checkpoint."""
    if shape not in SHAPES or style not in STYLES:
        raise typer.BadParameter(f"choose a shape of {', '.join(SHAPES)} and a style of {', '.join(STYLES)}")
    sizes = SHAPES[shape] if layers is None else replace(SHAPES[shape], layers=layers)
    folder.mkdir(parents=True)
    try:
        _write(folder, sizes, STYLES[style], seed)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _write(folder: Path, shape: Shape, renames: Sequence[tuple[str, str]], seed: int) -> None:
    config = _config(shape)
    config.save_pretrained(folder)
    _processor(shape).save_pretrained(folder)
    with torch.device("meta"):
        skeleton = LlavaForConditionalGeneration(config)
    tensors = {_renamed(name, renames): tuple(value.shape) for name, value in skeleton.state_dict().items()}
    shards = list(_shards(tensors))
    rng = np.random.default_rng(seed)
    index: dict[str, str] = {}
    # Weights are picked from this many normal ones, which is faster than drawing each.
    values = (SPREAD * rng.standard_normal(2**16)).astype(np.float16)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, {name: tensors[name] for name in names}, values, rng)
        index |= dict.fromkeys(names, file)
    total = sum(2 * int(np.prod(size)) for size in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(shape: Shape) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, dtype="float16")


def _processor(shape: Shape) -> LlavaProcessor:
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, shape.vocab))]
    words[32000], words[32001] = "<image>", "<pad>"
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _shards(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, shape in tensors.items():
        count = 2 * int(np.prod(shape))
        if shard and size + count > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += count
    yield shard


def _write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], values: Float16, rng: np.random.Generator) -> None:
    """Writes one safetensors file, tensor by tensor: https://huggingface.co/docs/safetensors, format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in track(tensors.items(), description=path.name, console=Console(stderr=True)):
            _draw(name, shape, values, rng).tofile(file)


def _draw(name: str, shape: tuple[int, ...], values: Float16, rng: np.random.Generator) -> Float16:
    if name.endswith(".bias"):
        return np.zeros(shape, np.float16)
    if len(shape) == 1:
        return np.ones(shape, np.float16)
    return values[rng.integers(len(values), size=shape, dtype=np.uint16)]


if __name__ == "__main__":
    typer.run(main)
