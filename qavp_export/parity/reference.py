"""The Hugging Face model with pruning and fake quantization by `numerics/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from qavp_export.engines import FloatArray, IntArray
from qavp_export.families import Plan
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import norm_relevance, random_relevance
from qavp_export.numerics.two_level import quantize_grouped_8bit, quantize_two_level
from qavp_export.parity.prompts import Prompts
from qavp_export.settings import Settings


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized linear layer of the exported decoder.

    Attributes:
        module: Its name in the Hugging Face model.
        precision: Its realized precision, for example `w4a4`.
        activation: Name of the graph's value that holds its quantized input; None if its input is float.
    """

    module: str
    precision: str
    activation: str | None


@dataclass
class CodeAgreement:
    """How the graph's 4-bit activations compare with the reference's, over tokens that are not padding.

    Attributes:
        compared: Activations compared.
        differing: Activations that are off by a code: float rounding moved them across a rounding boundary.
        worst: Largest distance, in steps of the reference's grid.
    """

    compared: int = 0
    differing: int = 0
    worst: float = 0.0

    def add(self, own: FloatArray, graph: FloatArray, scales: FloatArray, valid: IntArray) -> None:
        """Counts one layer's activations `[B,S,K]`, with scales `[B,S,K/G]` and `valid [B,S]`."""
        rows = valid.astype(bool)
        steps = np.repeat(scales, own.shape[-1] // scales.shape[-1], axis=-1)[rows]
        distance = np.abs(own - graph)[rows] / np.where(steps > 0, steps, np.float32(1))
        self.compared += distance.size
        self.differing += int((distance > 0.5).sum())
        self.worst = max(self.worst, float(distance.max(initial=0)))


class Reference:
    """The reference model.

    Args:
        checkpoint: The checkpoint folder.
        plan: The model's sizes.
        settings: The recipe, with every choice made.
        layers: The decoder's quantized linear layers.
    """

    def __init__(self, checkpoint: Path, plan: Plan, settings: Settings, layers: list[QuantizedLayer]) -> None:
        self._model = _load(checkpoint)
        self._plan = plan
        self._settings = settings
        self._layers = layers
        for layer in layers:
            _fake_quantize_weight(self._model.get_submodule(layer.module), layer.precision, settings.group_size)

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
    ) -> tuple[FloatArray, CodeAgreement]:
        """Runs a prefill and one more token on its cache, in step with the graph's quantized activations.

        Args:
            prompts: The prompts.
            features: Image features of the kept tokens `[B,k,D]`.
            observed: The graph's quantized activations by value name, for both steps.

        Returns:
            Logits `[B,S+1,V]`, and how the quantized activations compare.
        """
        text, agreement = self._model.model.language_model, CodeAgreement()
        with torch.no_grad(), self._quantized_inputs(prompts, observed, agreement):
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
        return logits, agreement

    @contextmanager
    def _quantized_inputs(
        self,
        prompts: Prompts,
        observed: Mapping[str, tuple[FloatArray, FloatArray]],
        agreement: CodeAgreement,
    ) -> Iterator[None]:
        valid = (prompts.mask, np.ones_like(prompts.next_ids))
        handles = []
        for layer in self._layers:
            if layer.activation is not None:
                steps = iter(zip(observed[layer.activation], valid, strict=True))
                hook = _QuantizeInput(steps, self._settings.group_size, agreement)
                handles.append(self._model.get_submodule(layer.module).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _QuantizeInput:
    """Forward pre-hook: compares a layer's quantized input with the graph's, and goes on with the graph's."""

    def __init__(self, steps: Iterator[tuple[FloatArray, IntArray]], group_size: int, agreement: CodeAgreement) -> None:
        self._steps = steps
        self._group_size = group_size
        self._agreement = agreement

    def __call__(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        own = quantize_two_level(args[0].numpy(), self._group_size)
        graph, valid = next(self._steps)
        self._agreement.add(own.dequantize(), graph, own.scales(), valid)
        return (torch.from_numpy(graph),)


def _load(checkpoint: Path) -> Any:
    auto: Any = AutoModelForImageTextToText
    with _no_progress_bar():
        return auto.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()


def _fake_quantize_weight(layer: Any, precision: str, group_size: int) -> None:
    weight = layer.weight.detach().numpy()
    if precision == "w4a4":
        values = quantize_two_level(weight, group_size).dequantize()
    elif precision == "w8a16":
        values = quantize_grouped_8bit(weight, group_size).dequantize()
    else:
        return
    # A new parameter, not an assignment into the old: an embedding table may share it.
    layer.weight = nn.Parameter(torch.from_numpy(values), requires_grad=False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    # transformers' own bar would be drawn over the export's.
    logging: Any = transformers_logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
