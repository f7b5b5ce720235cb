"""The Hugging Face decoder with fake quantization by `numerics/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qavp_export.engines import TOKEN_TYPES, FloatArray, IntArray
from qavp_export.families import Family, Plan
from qavp_export.parity.layers import Agreement, DecoderLayer, LayerHooks
from qavp_export.parity.prompts import Prompts
from qavp_export.parity.weights import WeightComparison
from qavp_export.settings import Settings

Observe = Callable[[str], Iterator[tuple[FloatArray, IntArray]]]
"""Yields, for each forward pass, the graph's quantized activations of that name and which tokens count."""

Cache = list[tuple[torch.Tensor, torch.Tensor]]


class DecoderReference:
    """The reference decoder, in step with the graph's quantized activations.

    Args:
        model: The Hugging Face model; weights of linear layers may be without data.
        family: The model's family.
        plan: The model's sizes.
        settings: The recipe, with every choice made.
        layers: The decoder's linear layers.
        weights: Gives the graph's weights.

    Attributes:
        activations: How the quantized activations compare.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        plan: Plan,
        settings: Settings,
        layers: list[DecoderLayer],
        weights: WeightComparison,
    ) -> None:
        self.activations = Agreement()
        self._model = model
        self._decoder = family.decoder(model)
        self._typed = any(value.name == TOKEN_TYPES for value in family.decoder_inputs(plan))
        self._plan = plan
        self._settings = settings
        self._layers = layers
        self._weights = weights

    def decode(self, prompts: Prompts, features: FloatArray, observe: Observe) -> FloatArray:
        """Runs a prefill and one more token on its cache.

        Args:
            prompts: The prompts.
            features: Image features of the kept tokens `[B,k,D]`.
            observe: Gives the graph's quantized activations, for both steps.

        Returns:
            Logits `[B,S+1,V]`.
        """
        step, ids = torch.from_numpy(prompts.next_ids), torch.from_numpy(prompts.ids)
        table = self._model.get_input_embeddings()
        with torch.no_grad(), self._hooks(observe):
            embeds = table(ids).float()
            embeds[ids == self._plan.image_token_id] = torch.from_numpy(features).reshape(-1, features.shape[-1])
            prefill, cache = self._prefill(prompts, embeds)
            mask, positions = torch.from_numpy(prompts.grown_mask), torch.from_numpy(prompts.next_positions)
            types = [torch.zeros_like(step)] if self._typed else []
            grown, _ = self._decoder(table(step).float(), mask, positions, *types, cache)
            logits: FloatArray = torch.cat([prefill, grown], dim=1).numpy()
        return logits

    def prefill(self, prompts: Prompts, embeds: FloatArray, observe: Observe) -> FloatArray:
        """Runs a prefill on embedded prompts `[B,S,D]` and returns logits `[B,S,V]`; see `decode`."""
        with torch.no_grad(), self._hooks(observe):
            logits: FloatArray = self._prefill(prompts, torch.from_numpy(embeds))[0].numpy()
        return logits

    def _prefill(self, prompts: Prompts, embeds: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        plan, types = self._plan, [torch.from_numpy(prompts.token_type_ids)] if self._typed else []
        empty = torch.zeros(len(embeds), plan.num_key_value_heads, 0, plan.head_dim)
        mask, positions = torch.from_numpy(prompts.mask), torch.from_numpy(prompts.positions)
        logits, cache = self._decoder(embeds, mask, positions, *types, [(empty, empty)] * plan.num_layers)
        return logits, cache

    @contextmanager
    def _hooks(self, observe: Observe) -> Iterator[None]:
        handles = []
        for layer in self._layers:
            steps = observe(layer.activation) if layer.activation is not None else iter(())
            hooks = LayerHooks(layer, self._settings, self._weights, steps, self.activations)
            module = self._model.get_submodule(layer.module)
            handles += [module.register_forward_pre_hook(hooks.before), module.register_forward_hook(hooks.after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
