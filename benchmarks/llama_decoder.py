"""The Llama decoder of a LLaVA checkpoint as a checkpoint of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from qavp_export.errors import CheckpointError
from qavp_export.safetensors_index import INDEX_FILE, TensorInfo, find_weights

# Names in a LLaVA repository, of both styles -> names of LlamaForCausalLM.
RENAMES: Sequence[tuple[str, str]] = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
_CHUNK_BYTES = 1 << 24


def extract_decoder(checkpoint: Path, folder: Path) -> None:
    """Writes the decoder of a LLaVA checkpoint as a `LlamaForCausalLM` checkpoint: weights, config and tokenizer.

    Bytes are copied as they are, shard by shard.

    Args:
        checkpoint: A LLaVA checkpoint folder, with safetensors weights.
        folder: Where to write; must not exist.
    """
    folder.mkdir(parents=True)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for info in find_weights(checkpoint).values():
        name = _renamed(info.name)
        if name is not None:
            shards.setdefault(info.file.name, {})[name] = info
    for file, tensors in shards.items():
        _copy(tensors, folder / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(info.nbytes for tensors in shards.values() for info in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = AutoConfig.from_pretrained(checkpoint)
    decoder = config.text_config
    decoder.architectures, decoder.dtype = ["LlamaForCausalLM"], config.dtype
    decoder.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def _renamed(name: str) -> str | None:
    for old, new in RENAMES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def _copy(tensors: Mapping[str, TensorInfo], target: Path) -> None:
    """Writes tensors of one safetensors file into another: https://huggingface.co/docs/safetensors, format."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        end = offset + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in tensors.values():
            with info.file.open("rb") as source:
                source.seek(info.offset)
                left = info.nbytes
                while left:
                    chunk = source.read(min(left, _CHUNK_BYTES))
                    if not chunk:
                        raise CheckpointError(f"{info.file} ended while it was copied; write the checkpoint again")
                    left -= file.write(chunk)
