"""The Hugging Face model with pruning and fake quantization by `numerics/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qavp_export.engines import FloatArray, IntArray
from qavp_export.families import Plan
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import norm_relevance, random_relevance
from qavp_export.parity.layers import Agreement, DecoderLayer, LayerFolder, LayerHooks
from qavp_export.parity.loading import load_reference
from qavp_export.parity.prompts import Prompts
from qavp_export.settings import Settings


class Reference:
    """The reference model.

    Args:
        checkpoint: The checkpoint folder.
        plan: The model's sizes.
        settings: The recipe, with every choice made.
        layers: The decoder's linear layers.
        graph: The decoder's graph; the reference goes on with its weights once they have been compared.

    Attributes:
        weights: The comparison of the weights.
        activations: How the quantized activations compare, once `decode` has run.
    """

    def __init__(
        self, checkpoint: Path, plan: Plan, settings: Settings, layers: list[DecoderLayer], graph: Path
    ) -> None:
        self._model: Any = load_reference(checkpoint)
        self._plan = plan
        self._settings = settings
        self._layers = layers
        self.activations = Agreement()
        self.weights = LayerFolder(self._model, settings, graph)
        self.weights.fold(layers)

    def vision(self, pixels: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
        """Returns kept indices `[B,k]`, scores `[B,N]` and unpruned features `[B,N,D]`."""
        recipe, settings = self._settings.recipe, self._settings
        with torch.no_grad():
            features = self._model.get_image_features(torch.from_numpy(pixels)).pooler_output
            features = torch.stack(list(features)).numpy()
        if settings.tokens_kept == self._plan.vision_tokens:
            everything = np.broadcast_to(np.arange(features.shape[1]), features.shape[:2])
            return everything, np.zeros(features.shape[:2], np.float32), features
        scores = hybrid_token_score(
            features,
            self._semantic(pixels, features),
            group_size=settings.group_size,
            alpha=recipe.alpha,
            score_input=recipe.score_input,
        )
        return select_topk(scores, settings.tokens_kept), scores, features

    def _semantic(self, pixels: FloatArray, features: FloatArray) -> FloatArray:
        if self._settings.semantic == "norm":
            return norm_relevance(features)
        if self._settings.semantic == "random":
            draw = random_relevance(self._settings.recipe.seed, features.shape[1])
            return np.broadcast_to(draw, features.shape[:2])
        with torch.no_grad():
            attentions = self._model.model.vision_tower(torch.from_numpy(pixels), output_attentions=True).attentions
        chosen = self._model.config.vision_feature_layer
        # Indices into hidden_states, where state i is the output of layer i - 1.
        states = [chosen] if isinstance(chosen, int) else chosen
        latest = max(state if state >= 0 else len(attentions) + 1 + state for state in states)
        weights: FloatArray = attentions[latest - 1].numpy()
        first = int(self._plan.has_cls_token)
        # cls: the one query is [CLS]; received: the queries are the patches.
        queries = slice(0, 1) if self._settings.semantic == "cls" else slice(first, None)
        relevance: FloatArray = weights[:, :, queries, first:].mean(axis=(1, 2))
        return relevance

    def decode(
        self,
        prompts: Prompts,
        features: FloatArray,
        observed: Mapping[str, tuple[FloatArray, FloatArray]],
    ) -> FloatArray:
        """Runs a prefill and one more token on its cache, in step with the graph's quantized activations.

        Args:
            prompts: The prompts.
            features: Image features of the kept tokens `[B,k,D]`.
            observed: The graph's quantized activations by value name, for both steps.

        Returns:
            Logits `[B,S+1,V]`.
        """
        text = self._model.model.language_model
        with torch.no_grad(), self._hooks(prompts, observed):
            ids, next_ids = torch.from_numpy(prompts.ids), torch.from_numpy(prompts.next_ids)
            embeds = text.embed_tokens(ids)
            embeds[ids == self._plan.image_token_id] = torch.from_numpy(features).reshape(-1, features.shape[-1])
            prefill = text(
                inputs_embeds=embeds,
                attention_mask=torch.from_numpy(prompts.mask),
                position_ids=torch.from_numpy(prompts.positions),
                use_cache=True,
            )
            step = text(
                input_ids=next_ids,
                attention_mask=torch.from_numpy(prompts.grown_mask),
                position_ids=torch.from_numpy(prompts.next_positions),
                past_key_values=prefill.past_key_values,
                use_cache=True,
            )
            hidden = torch.cat([prefill.last_hidden_state, step.last_hidden_state], dim=1)
            logits: FloatArray = self._model.lm_head(hidden).numpy()
        return logits

    @contextmanager
    def _hooks(self, prompts: Prompts, observed: Mapping[str, tuple[FloatArray, FloatArray]]) -> Iterator[None]:
        valid = (prompts.mask, np.ones_like(prompts.next_ids))
        handles = []
        for layer in self._layers:
            steps = zip(observed[layer.activation], valid, strict=True) if layer.activation is not None else ()
            hooks = LayerHooks(layer, self._settings, iter(steps), self.activations)
            module = self._model.get_submodule(layer.module)
            handles += [module.register_forward_pre_hook(hooks.before), module.register_forward_hook(hooks.after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
