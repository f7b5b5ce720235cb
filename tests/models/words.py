"""A tokenizer of whole words, and weights that make greedy decoding decide clearly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from tests.models.tiny import WORDS

PAD, BOS, EOS, UNK = range(4)


def word_tokenizer(
    special: Sequence[str], vocab: int, named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with `vocab` entries.

    Args:
        special: Special tokens; their ids follow those of `PAD`, `BOS`, `EOS` and `UNK`.
        vocab: Entries in all.
        named: Special tokens by the attribute of the tokenizer that a processor reads, such as `image_token`.
    """
    entries = ["<pad>", "<bos>", "<eos>", "<unk>", *special, *WORDS]
    entries += [f"w{number}" for number in range(len(entries), vocab)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=dict(named or {}),
        padding_side="left",
    )
    unnamed = [token for token in special if token not in (named or {}).values()]
    fast.add_tokens(unnamed, special_tokens=True)
    return fast


def tiny_text(kind: type[PreTrainedConfig], vocab: int, context: int, **settings: Any) -> PreTrainedConfig:
    """Returns the configuration of a decoder with grouped-query attention and sizes that are no powers of two."""
    return kind(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=context,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **settings,
    )


def save_parts(
    folder: Path, processor_class: str, image_processor: Any, tokenizer: Any, chat_template: str, **settings: int
) -> None:
    """Writes the files of a processor that transformers cannot build here: it would also take videos."""
    image_processor.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    config = {"processor_class": processor_class, **settings}
    (folder / "processor_config.json").write_text(json.dumps(config), encoding="utf-8")


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Adds noise to every parameter: the default 0.02 leaves logits so flat that greedy decoding turns on rounding.

    Norms behind a layer, as Gemma has them, get large gains: with a tied head the embedding that the stream begins with
    would repeat the last token for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.dim() > 1 else 0.05))
            if "language_model" in name and "post_feedforward_layernorm" in name:
                parameter.add_(5.0)
