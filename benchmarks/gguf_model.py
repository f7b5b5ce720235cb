"""A Llama decoder of random weights in GGUF, each tensor in the type that llama.cpp's own Q4_0 quantization gives it.

Linear layers and the token embedding in Q4_0, the output projection in Q6_K, norms in float32. The codes are drawn, not
rounded from floats: gguf has no Q6_K quantizer, and speed does not depend on them.

Runs in the environment of llama-cpp-python: it imports gguf and NumPy, nothing of the project.

python gguf_model.py '{"path": "tiny.gguf", "hidden": 256, "intermediate": 512, "layers": 2, "heads": 4, ...}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, LlamaFileType

UInt8 = npt.NDArray[np.uint8]
Tensor = tuple[str, tuple[int, ...], GGMLQuantizationType]

# Of a linear weight, as in make_checkpoint.py.
SPREAD = 0.02
# Standard deviations of codes drawn evenly from 0..15 and 0..63.
_Q4_SPREAD, _Q6_SPREAD = np.sqrt((16**2 - 1) / 12), np.sqrt((64**2 - 1) / 12)
_Q6_SCALE = 32


@dataclass(frozen=True)
class Llama:
    """Sizes of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 4096
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0

    def tensors(self) -> Iterator[Tensor]:
        """Yields name, shape (outputs first) and type of every tensor, by the names of GGUF's Llama architecture."""
        keys = self.kv_heads * (self.hidden // self.heads)
        linear = {
            "attn_q": (self.hidden, self.hidden),
            "attn_k": (keys, self.hidden),
            "attn_v": (keys, self.hidden),
            "attn_output": (self.hidden, self.hidden),
            "ffn_gate": (self.intermediate, self.hidden),
            "ffn_up": (self.intermediate, self.hidden),
            "ffn_down": (self.hidden, self.intermediate),
        }
        yield "token_embd.weight", (self.vocab, self.hidden), GGMLQuantizationType.Q4_0
        for layer in range(self.layers):
            for name, shape in linear.items():
                yield f"blk.{layer}.{name}.weight", shape, GGMLQuantizationType.Q4_0
            for name in ("attn_norm", "ffn_norm"):
                yield f"blk.{layer}.{name}.weight", (self.hidden,), GGMLQuantizationType.F32
        yield "output_norm.weight", (self.hidden,), GGMLQuantizationType.F32
        yield "output.weight", (self.vocab, self.hidden), GGMLQuantizationType.Q6_K


def write_model(path: Path, sizes: Llama, seed: int = 0) -> None:
    """Writes the model, tensor by tensor; without a vocabulary, so prompts are token ids.

    Args:
        path: Where to write.
        sizes: The decoder; `hidden` and `intermediate` must be multiples of 256, the block of Q6_K.
        seed: Seed of the codes.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_block_count(sizes.layers)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_rope_dimension_count(sizes.hidden // sizes.heads)
    writer.add_rope_freq_base(sizes.rope_base)
    writer.add_layer_norm_rms_eps(sizes.norm_epsilon)
    writer.add_vocab_size(sizes.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    tensors = list(sizes.tensors())
    for name, shape, kind in tensors:
        stored = shape if kind is GGMLQuantizationType.F32 else gguf.quant_shape_to_byte_shape(shape, kind)
        dtype = np.dtype(np.float32 if kind is GGMLQuantizationType.F32 else np.uint8)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for _, shape, kind in tensors:
        writer.write_tensor_data(_draw(shape, kind, rng))
    writer.close()


def _draw(shape: tuple[int, ...], kind: GGMLQuantizationType, rng: np.random.Generator) -> npt.NDArray[np.generic]:
    """Returns the blocks of a tensor, layouts as in ggml-common.h: block_q4_0, block_q6_K."""
    if kind is GGMLQuantizationType.F32:
        return np.ones(shape, np.float32)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks: UInt8 = rng.integers(0, 256, size=(int(np.prod(shape)) // values, size), dtype=np.uint8)
    if kind is GGMLQuantizationType.Q4_0:
        blocks[:, :2] = _bytes(np.float16(SPREAD / _Q4_SPREAD))
    else:
        blocks[:, -2:] = _bytes(np.float16(SPREAD / _Q6_SPREAD / _Q6_SCALE))
        blocks[:, -2 - gguf.QK_K // 16 : -2] = _Q6_SCALE
    return blocks


def _bytes(scale: np.float16) -> UInt8:
    return np.frombuffer(scale.tobytes(), np.uint8)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    target = Path(arguments.pop("path"))
    write_model(target, Llama(**arguments))
    print(json.dumps({"path": str(target), "bytes": target.stat().st_size}))
