"""What a model family tells the exporter: which modules make the three components, and how tensors are named.

A family is one file: a subclass of `Family` for one `model_type`. It builds the Hugging Face model without weights
(`tracing.skeleton`), wraps parts of it into the three component modules that are traced, and translates parameter
names into the names that checkpoints use.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qavp_export.errors import CheckpointError
from qavp_export.numerics.semantic import Scorer


@dataclass(frozen=True)
class Plan:
    """The sizes of a model, read from its configuration alone.

    Attributes:
        image_size: Height and width of the vision tower's input, pixels.
        vision_tokens: Tokens per image after the projector (N).
        image_token_id: The placeholder's token id.
        hidden_size: Channels of the decoder's residual stream and of the projected tokens (D).
        intermediate_size: Channels of the decoder's MLP.
        num_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Channels of each head.
        vocab_size: Rows of the embedding table.
        context_length: Longest sequence that the decoder was built for.
        has_cls_token: Whether the vision tower has a [CLS] token.
    """

    image_size: tuple[int, int]
    vision_tokens: int
    image_token_id: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    has_cls_token: bool


class Family(ABC):
    """One model family, found by `config.model_type`.

    Attributes:
        model_type: The `model_type` in config.json.
        description: One line for `--list-models`.
        scorers: Semantic scorers that work for the family, the default first.
        renames: Regular expressions, applied in order, that turn a checkpoint's tensor name into the parameter's name;
            every spelling that published checkpoints use.
    """

    model_type: ClassVar[str]
    description: ClassVar[str]
    scorers: ClassVar[tuple[Scorer, ...]]
    renames: ClassVar[tuple[tuple[str, str], ...]]

    @abstractmethod
    def plan(self, config: Any) -> Plan:
        """Returns the model's sizes.

        Args:
            config: The Hugging Face configuration.

        Raises:
            CheckpointError: The configuration is contradictory or asks for what is not supported.
        """

    @abstractmethod
    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns a module: `pixel_values [B,3,H,W]` f32 -> `image_features [B,N,D]`."""

    @abstractmethod
    def embedding(self, model: Any) -> nn.Module:
        """Returns a module: `input_ids [B,S]`, `image_features [I,k,D]` -> `inputs_embeds [B,S,D]`."""

    @abstractmethod
    def decoder(self, model: Any) -> nn.Module:
        """Returns a module: embeddings, mask, positions and past key/values -> logits and present key/values."""

    def parameter_names(self, checkpoint_names: Iterable[str]) -> dict[str, str]:
        """Maps parameter names to the names of the checkpoint's tensors.

        Args:
            checkpoint_names: Names of all tensors in the checkpoint.

        Raises:
            CheckpointError: Two tensors of the checkpoint claim the same parameter.
        """
        names: dict[str, str] = {}
        for source in checkpoint_names:
            target = source
            for pattern, replacement in self.renames:
                target = re.sub(pattern, replacement, target)
            if target in names:
                raise CheckpointError(
                    f"tensors {names[target]} and {source} of the checkpoint both mean {target}; "
                    "remove one of the two layouts"
                )
            names[target] = source
        return names


class MergeEmbedding(nn.Module):
    """Token embedding with image features in the place of image placeholders.

    The i-th placeholder of the batch, counted row by row, takes the i-th feature. A placeholder without a
    feature makes the gather fail (index out of range) rather than yield zeros.
    """

    def __init__(self, embed_tokens: nn.Module, image_token_id: int) -> None:
        """Wraps `embed_tokens` for the placeholder `image_token_id`."""
        super().__init__()
        self.embed_tokens = embed_tokens
        self.image_token_id = image_token_id

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Returns `inputs_embeds [B,S,D]` for `input_ids [B,S]` and `image_features [I,k,D]`."""
        embeds = self.embed_tokens(input_ids)
        width = embeds.shape[-1]
        is_image = input_ids == self.image_token_id
        # Row 0 is what text tokens fetch and discard: it keeps the gather valid for a batch without images.
        flat = torch.cat([image_features.new_zeros(1, width), image_features.reshape(-1, width)])
        rank = torch.cumsum(is_image.reshape(-1).to(torch.int64), dim=0).reshape(input_ids.shape)
        index = rank * is_image.to(torch.int64)
        return torch.where(is_image.unsqueeze(-1), flat[index], embeds)


class CachedDecoder(nn.Module):
    """A Hugging Face decoder with its cache as plain inputs and outputs."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        """Wraps a text model that returns `last_hidden_state`, and its output projection."""
        super().__init__()
        self.model = model
        self.lm_head = lm_head

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns logits and the grown cache.

        Args:
            inputs_embeds: `[B,S,D]`.
            attention_mask: `[B,P+S]` int64, 1 for tokens and 0 for padding.
            position_ids: `[B,S]` int64.
            past_key_values: Per layer a key and a value `[B,KV,P,head_dim]`.

        Returns:
            Logits `[B,S,V]`, and per layer the key and value `[B,KV,P+S,head_dim]`.
        """
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(past_key_values):
            cache.update(key, value, layer)
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return self.lm_head(output.last_hidden_state), present


def decoder_sizes(text_config: Any) -> Mapping[str, int]:
    """Returns the decoder's sizes under the names of `Plan`, with the defaults that transformers applies."""
    heads = int(text_config.num_attention_heads)
    hidden = int(text_config.hidden_size)
    return {
        "hidden_size": hidden,
        "intermediate_size": int(text_config.intermediate_size),
        "num_layers": int(text_config.num_hidden_layers),
        "num_attention_heads": heads,
        "num_key_value_heads": int(getattr(text_config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text_config, "head_dim", None) or hidden // heads),
        "vocab_size": int(text_config.vocab_size),
        "context_length": int(text_config.max_position_embeddings),
    }
