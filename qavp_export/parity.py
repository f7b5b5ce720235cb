"""Compares the exported graphs with the PyTorch model doing the same arithmetic.

The reference is the Hugging Face model as transformers loads it, in float32, with scoring, selection and fake
quantization done by `numerics/` (NumPy). Nothing of the exporter takes part in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from qavp_export.engines import Engine, EngineOptions, FloatArray, IntArray, load_engine
from qavp_export.families import Plan
from qavp_export.manifest import Manifest
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_topk
from qavp_export.numerics.semantic import norm_relevance, random_relevance
from qavp_export.numerics.two_level import quantize_grouped_8bit, quantize_two_level
from qavp_export.settings import Settings

Verdict = Literal["PASS", "FAIL", "NOT COMPARED"]

# Float graphs differ from torch by the order of sums. Relative to the largest logit.
FLOAT_TOLERANCE = 1e-3
# Under W4A4 that rounding moves single activations across a rounding boundary, by one 4-bit step. Measured on tiny
# random models and the demo model: cosine above 0.99999. Multipliers one group off fail (tests/test_export.py).
W4A4_COSINE = 0.999
# Two scores closer than this are a tie as far as float32 sums can tell.
SCORE_TOLERANCE = 1e-5
_TEXT_LENGTHS = (7, 4)


@dataclass(frozen=True)
class Parity:
    """What was compared and found.

    Attributes:
        verdict: PASS, FAIL or NOT COMPARED.
        reason: Why the verdict is not PASS; empty otherwise.
        compared: What the figures cover.
        max_abs: Largest absolute difference of logits.
        mean_abs: Mean absolute difference of logits.
        cosine: Cosine similarity of all logits as one vector.
        argmax_agreement: Fraction of positions with the same most likely token.
        features_max_abs: Largest absolute difference of the surviving image features.
        kept_indices_equal: Fraction of kept indices that agree.
    """

    verdict: Verdict
    reason: str
    compared: str
    max_abs: float | None = None
    mean_abs: float | None = None
    cosine: float | None = None
    argmax_agreement: float | None = None
    features_max_abs: float | None = None
    kept_indices_equal: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def check_parity(
    checkpoint: Path,
    bundle: Path,
    manifest: Manifest,
    plan: Plan,
    settings: Settings,
    quantized: Mapping[str, str],
) -> Parity:
    """Compares the bundle's graphs with the reference on two random images and a padded batch of two prompts.

    Covers the vision encoder with scoring and selection, the embedding, a prefill with left padding and one decode
    step on the prefill's cache.

    Args:
        checkpoint: The checkpoint folder.
        bundle: The folder that holds the graphs.
        manifest: The bundle's manifest, `parity` not yet filled in.
        plan: The model's sizes.
        settings: The recipe, with every choice made.
        quantized: Realized precision by Hugging Face module name, for the decoder's linear layers.

    Returns:
        The figures and the verdict.
    """
    needed, available = _reference_bytes(checkpoint), _available_bytes()
    if needed > available:
        reason = f"the reference needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free"
        return Parity("NOT COMPARED", reason, "nothing")
    # Fusions of quantized layers move results by up to 0.02; parity is about the graph as it is written.
    engine = load_engine("ort-cpu", bundle, manifest, EngineOptions(graph_optimization="disable"))
    reference = _Reference(checkpoint, plan, settings, quantized)
    rng = np.random.default_rng(settings.recipe.seed)
    pixels = rng.standard_normal((2, 3, *plan.image_size)).astype(np.float32)

    image_features, kept_indices = engine.encode_images(pixels)
    kept, scores, features = reference.vision(pixels)
    agreement = _selection_agreement(kept_indices, kept, scores)
    # From here on both sides see the same tokens, so that a tie does not hide a difference.
    chosen = np.take_along_axis(features, kept_indices[..., None], axis=1)
    features_max_abs = float(np.max(np.abs(chosen - image_features)))

    prompts = _prompts(rng, plan, settings.tokens_kept)
    actual = _run_engine(engine, prompts, image_features)
    expected = reference.decode(prompts, torch.from_numpy(chosen))
    valid = np.concatenate([prompts.mask, np.ones_like(prompts.next_ids)], axis=1).astype(bool)
    return _judge(actual[valid], expected[valid], agreement, features_max_abs, settings)


@dataclass(frozen=True)
class _Prompts:
    """Two prompts, left padded, and the token that follows each.

    Attributes:
        ids: Token ids `[2,S]`.
        mask: 1 for tokens, 0 for padding `[2,S]`.
        next_ids: `[2,1]`.
    """

    ids: IntArray
    mask: IntArray
    next_ids: IntArray

    @property
    def positions(self) -> IntArray:
        """Position ids `[2,S]`."""
        return np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)

    @property
    def grown_mask(self) -> IntArray:
        """Mask `[2,S+1]` of prompt and next token."""
        return np.concatenate([self.mask, np.ones_like(self.next_ids)], axis=1)


class _Reference:
    """The Hugging Face model with pruning and fake quantization by `numerics/`."""

    def __init__(self, checkpoint: Path, plan: Plan, settings: Settings, quantized: Mapping[str, str]) -> None:
        with _no_progress_bar():
            auto: Any = AutoModelForImageTextToText
            model = auto.from_pretrained(
                checkpoint,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).eval()
        self._model = model
        self._plan = plan
        self._settings = settings
        for name, precision in quantized.items():
            _fake_quantize(model.get_submodule(name), precision, settings.group_size)

    def vision(self, pixels: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
        """Returns kept indices `[B,k]`, scores `[B,N]` and unpruned features `[B,N,D]`."""
        recipe, settings = self._settings.recipe, self._settings
        with torch.no_grad():
            features = self._model.get_image_features(torch.from_numpy(pixels)).pooler_output
            features = torch.stack(list(features)).numpy()
        if settings.tokens_kept == self._plan.vision_tokens:
            everything = np.broadcast_to(np.arange(features.shape[1]), features.shape[:2])
            return everything, np.zeros(features.shape[:2], np.float32), features
        semantic = self._semantic(pixels, features)
        scores = hybrid_token_score(
            features,
            semantic,
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
        layer = self._model.config.vision_feature_layer
        last = layer if isinstance(layer, int) else layer[-1]
        # hidden_states[i] is the output of layer i - 1.
        weights: FloatArray = attentions[last if last < 0 else last - 1].numpy()
        first = int(self._plan.has_cls_token)
        # cls: the one query is [CLS]; received: the queries are the patches.
        queries = slice(0, 1) if self._settings.semantic == "cls" else slice(first, None)
        relevance: FloatArray = weights[:, :, queries, first:].mean(axis=(1, 2))
        return relevance

    def decode(self, prompts: _Prompts, features: torch.Tensor) -> FloatArray:
        """Returns logits `[B,S+1,V]` of a prefill and of one more token on its cache."""
        text = self._model.model.language_model
        with torch.no_grad():
            ids, next_ids = torch.from_numpy(prompts.ids), torch.from_numpy(prompts.next_ids)
            embeds = text.embed_tokens(ids)
            embeds[ids == self._plan.image_token_id] = features.reshape(-1, features.shape[-1])
            positions = torch.from_numpy(prompts.positions)
            prefill = text(
                inputs_embeds=embeds,
                attention_mask=torch.from_numpy(prompts.mask),
                position_ids=positions,
                use_cache=True,
            )
            step = text(
                input_ids=next_ids,
                attention_mask=torch.from_numpy(prompts.grown_mask),
                position_ids=positions[:, -1:] + 1,
                past_key_values=prefill.past_key_values,
                use_cache=True,
            )
            hidden = torch.cat([prefill.last_hidden_state, step.last_hidden_state], dim=1)
            logits: FloatArray = self._model.lm_head(hidden).numpy()
        return logits


def _fake_quantize(layer: Any, precision: str, group_size: int) -> None:
    weight = layer.weight.detach().numpy()
    if precision == "w4a4":
        values = quantize_two_level(weight, group_size).dequantize()

        def quantize_input(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (torch.from_numpy(quantize_two_level(args[0].numpy(), group_size).dequantize()),)

        layer.register_forward_pre_hook(quantize_input)
    elif precision == "w8a16":
        values = quantize_grouped_8bit(weight, group_size).dequantize()
    else:
        return
    # A new parameter, not an assignment into the old: an embedding table may share it.
    layer.weight = nn.Parameter(torch.from_numpy(values), requires_grad=False)


def _prompts(rng: np.random.Generator, plan: Plan, tokens_kept: int) -> _Prompts:
    """Returns two prompts with one image each and text of different lengths."""
    text_ids = np.array([token for token in range(plan.vocab_size) if token != plan.image_token_id])
    image = np.full(tokens_kept, plan.image_token_id)
    rows = [np.concatenate([rng.choice(text_ids, 2), image, rng.choice(text_ids, length)]) for length in _TEXT_LENGTHS]
    width = max(map(len, rows))
    ids = [np.pad(row, (width - len(row), 0), constant_values=text_ids[0]) for row in rows]
    mask = [np.pad(np.ones_like(row), (width - len(row), 0)) for row in rows]
    next_ids = rng.choice(text_ids, (len(rows), 1))
    return _Prompts(np.stack(ids).astype(np.int64), np.stack(mask).astype(np.int64), next_ids.astype(np.int64))


def _run_engine(engine: Engine, prompts: _Prompts, image_features: FloatArray) -> FloatArray:
    """Returns logits `[B,S+1,V]` of the same two steps as `_Reference.decode`."""
    session = engine.start()
    embeds = engine.embed(prompts.ids, image_features)
    prefill = session.prefill(embeds, prompts.mask, prompts.positions)
    step = session.decode(prompts.next_ids, prompts.grown_mask, prompts.positions[:, -1:] + 1)
    return np.concatenate([prefill, step], axis=1)


def _selection_agreement(actual: IntArray, expected: IntArray, scores: FloatArray) -> float:
    """Returns the fraction of equal kept indices; a swap of two tied tokens counts as equal."""
    equal = 0
    for ours, theirs, row in zip(actual, expected, scores, strict=True):
        threshold = row[theirs].min()
        tied = {int(token) for token in ours if abs(row[token] - threshold) <= SCORE_TOLERANCE}
        equal += len({int(token) for token in ours} & ({int(token) for token in theirs} | tied))
    return equal / actual.size


def _judge(
    actual: FloatArray, expected: FloatArray, agreement: float, features_max_abs: float, settings: Settings
) -> Parity:
    difference = np.abs(actual.astype(np.float64) - expected)
    norms = np.linalg.norm(actual.astype(np.float64)) * np.linalg.norm(expected.astype(np.float64))
    cosine = float(np.sum(actual.astype(np.float64) * expected) / norms) if norms else 1.0
    relative = float(difference.max() / max(float(np.abs(expected).max()), 1e-30))
    reasons = []
    if not np.isfinite(actual).all():
        reasons.append("the graphs yield values that are not finite")
    if agreement < 1:
        reasons.append(f"{1 - agreement:.1%} of the kept tokens differ beyond ties")
    if settings.recipe.decoder == "float" and settings.recipe.lm_head == "float":
        if not relative <= FLOAT_TOLERANCE:
            reasons.append(f"logits differ by {relative:.1e} of the largest, more than {FLOAT_TOLERANCE:g}")
    elif not cosine >= W4A4_COSINE:
        reasons.append(f"cosine of logits is {cosine:.5f}, less than {W4A4_COSINE}")
    return Parity(
        verdict="FAIL" if reasons else "PASS",
        reason="; ".join(reasons),
        compared="complete graphs; 2 random images, 2 left-padded prompts, prefill and 1 decode step",
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine=cosine,
        argmax_agreement=float(np.mean(actual.argmax(-1) == expected.argmax(-1))),
        features_max_abs=features_max_abs,
        kept_indices_equal=agreement,
    )


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


def _reference_bytes(checkpoint: Path) -> int:
    # float32 weights from 16-bit files, while the file is mapped, and one layer's quantization on top.
    return 3 * sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
