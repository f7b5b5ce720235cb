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
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qavp_export.errors import CheckpointError
from qavp_export.families.rotary import context_length, replace_dynamic_rotary
from qavp_export.numerics.semantic import Scorer
from qavp_export.passes.relevance import TEXT_INPUT_IDS

Layout: TypeAlias = Literal["grid", "tiles", "native"]

# The dynamic axis of a question's tokens.
TEXT_TOKENS = "text_tokens"

# Sample sizes of the axes that all families share; all differ and none is 1, so that no two are taken for the same.
BATCH, SEQUENCE, PAST = 2, 3, 5


@dataclass(frozen=True)
class Plan:
    """The sizes of a model, read from its configuration alone.

    A *unit* is what the keep ratio applies to: one selection of k of its N tokens; see `Family.layout`.

    Attributes:
        image_size: Height and width of the vision tower's input, pixels; None if they vary with the image.
        vision_tokens: Tokens per unit after the projector (N); None if they vary with the image.
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
        tower_patches: Patches of one image in the vision tower, [CLS] not counted, where they are not the tokens
            (pooled, merged, packed from tiles); None where they are, or where their number varies.
        patch_size: Side of a patch, pixels, where the image size varies; None elsewhere.
        merge_size: Side of a token, patches, where the image size varies.
    """

    image_size: tuple[int, int] | None
    vision_tokens: int | None
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
    tower_patches: int | None = None
    patch_size: int | None = None
    merge_size: int = 1


@dataclass(frozen=True)
class GraphInput:
    """One input of a component's graph.

    Attributes:
        name: Its name.
        dtype: Its type.
        shape: Its sizes; a string is a dynamic axis, and axes of one name have one size.
        sample: Sizes to trace with, `shape` where that is a number. No two dynamic axes of different names may have
            the same, and none may be 0 or 1: the tracer would take them for one axis, or for a constant.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    sample: tuple[int, ...]


class Family(ABC):
    """One model family, found by `config.model_type`.

    Attributes:
        model_type: The `model_type` in config.json.
        description: One line for `--list-models`.
        layout: How images become units, and with it the vision encoder's inputs.
            `grid`: every tile is a unit of N tokens, any number of tiles per call.
            `tiles`: the tiles of one image are a unit, packed into one sequence, one image per call.
            `native`: an image in its own resolution is a unit, one image per call.
        row_break_token: What the processor writes between the rows of an image; None if nothing.
        scorers: Semantic scorers that work for the family, the default first.
        renames: Regular expressions, applied in order, that turn a checkpoint's tensor name into the parameter's name;
            every spelling that published checkpoints use.
    """

    model_type: ClassVar[str]
    description: ClassVar[str]
    layout: ClassVar[Layout] = "grid"
    row_break_token: ClassVar[str | None] = None
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

    def vision_inputs(self, plan: Plan) -> tuple[GraphInput, ...]:
        """Returns the vision encoder's inputs: `pixel_values [batch,3,H,W]` f32 unless a family says otherwise.

        `keep_tokens` and `patch_relevance` are not among them: passes add the one and consume the other.
        """
        if plan.image_size is None:
            raise NotImplementedError(f"{self.model_type}: a family without an image size declares its vision inputs")
        height, width = plan.image_size
        return (GraphInput("pixel_values", torch.float32, ("batch", 3, height, width), (BATCH, 3, height, width)),)

    def relevance_input(self, plan: Plan) -> GraphInput | None:
        """Returns what `patch_relevance` looks like, `[T,P]` f32; None where tokens are the tower's patches.

        Where they are not, the vision module takes it as its last argument and puts it through the same spatial
        operations as the features, on one channel (the mean of merged patches; 0 for a learned token); see
        `vision_encoder`. The pass `InsertHybridScore` replaces it by what the scorer computes from the attention of the
        tower's T images of P patches. By default it is there if the plan states `tower_patches`.
        """
        if plan.tower_patches is None:
            return None
        pixels = self.vision_inputs(plan)[0]
        shape, sample = (pixels.shape[0], plan.tower_patches), (pixels.sample[0], plan.tower_patches)
        return GraphInput("patch_relevance", torch.float32, shape, sample)

    def decoder_inputs(self, plan: Plan) -> tuple[GraphInput, ...]:
        """Returns what the decoder takes beyond the contract, between position_ids and past_key_values.

        Axes are `batch`, `sequence`, `past` or `total`, of sample sizes `BATCH`, `SEQUENCE`, `PAST` and the sum of the
        last two.
        """
        del plan
        return ()

    def layout_settings(self, config: Any) -> dict[str, Any]:
        """Returns what the runtime's layout needs to know of the configuration, as JSON values."""
        del config
        return {}

    def random_images(
        self, config: Any, plan: Plan, rng: np.random.Generator, *, pruned: bool
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Draws two small images for the comparison with PyTorch, of the same number of tokens N.

        Args:
            config: The Hugging Face configuration.
            plan: The model's sizes.
            rng: Where they come from.
            pruned: Whether the graph prunes.

        Returns:
            The vision module's arguments by name and in order, call by call; `patch_relevance`, where it takes one, is
            zeros.
        """
        del config, pruned
        given, relevance = self.vision_inputs(plan), self.relevance_input(plan)
        if len(given) != 1 or given[0].sample[0] != BATCH:
            raise NotImplementedError(f"{self.model_type}: a family with its own vision inputs draws its own images")
        images: dict[str, npt.NDArray[Any]] = {given[0].name: rng.standard_normal(given[0].sample).astype(np.float32)}
        return [images if relevance is None else images | {relevance.name: np.zeros(relevance.sample, np.float32)}]

    def question_input(self) -> GraphInput:
        """Returns what a vision encoder takes that scores its tokens by a question: `text_input_ids [batch,L]` i64.

        Each image has its own question, in the vocabulary of CLIP's text tower. Behind the token that ends it there may
        be padding, of that token again: the text tower is causal and reads the first that ends the text.
        """
        return GraphInput(TEXT_INPUT_IDS, torch.int64, ("batch", TEXT_TOKENS), (BATCH, SEQUENCE))

    def question_encoder(self, model: Any, clip: Any) -> nn.Module:
        """Returns the vision encoder of the scorer `text`; families that list the scorer have one.

        It is a module: `vision_inputs`, `question_input` -> `image_features [batch,N,D]`, `token_relevance [batch,N]`.

        Args:
            model: The Hugging Face model.
            clip: The `CLIPModel` whose vision tower the model's is.
        """
        raise NotImplementedError(f"{self.model_type} has no vision encoder that reads a question")

    @abstractmethod
    def vision_encoder(self, model: Any) -> nn.Module:
        """Returns a module: `vision_inputs` -> `image_features`, `[batch,N,D]` for layout `grid` and `[1,N,D]` else.

        With a `relevance_input`, which is its last argument, it returns the pair of features and `token_relevance
        [batch,N]`, or `[1,N]`.
        """

    def text_model(self, model: Any) -> Any:
        """Returns the decoder without its head; it has an embedding table `embed_tokens`."""
        return model.model.language_model

    def embedding(self, model: Any) -> nn.Module:
        """Returns a module: `input_ids [B,S]`, `image_features [I,k,D]` -> `inputs_embeds [B,S,D]`."""
        return MergeEmbedding(self.text_model(model).embed_tokens, int(model.config.image_token_id))

    def decoder(self, model: Any) -> nn.Module:
        """Returns a module: embeddings, mask, positions, past key/values -> logits and present key/values.

        `decoder_inputs`, if there are any, are its arguments between positions and past.
        """
        return CachedDecoder(self.text_model(model), model.lm_head)

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
        replace_dynamic_rotary(model)
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
        return self.run(inputs_embeds, attention_mask, position_ids, past_key_values)

    def run(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | Mapping[str, Tensor],
        position_ids: Tensor,
        past_key_values: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """As `forward`; the mask may also be one `[B,1,S,P+S]` that says it all, or one for each kind of layer."""
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
        "context_length": context_length(text_config),
    }
