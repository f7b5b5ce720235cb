"""The parity check and its verdict."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qavp_export.engines import Encoders, EngineOptions, FloatArray, IntArray
from qavp_export.engines.ort import OrtCpuEngine, OrtEncoders
from qavp_export.families import Plan
from qavp_export.manifest import Manifest
from qavp_export.parity.layers import Agreement, DecoderLayer
from qavp_export.parity.loading import reference_bytes
from qavp_export.parity.nvfp4 import ReadWeight, check_nvfp4_weights
from qavp_export.parity.prompts import random_prompts
from qavp_export.parity.reference import Reference
from qavp_export.parity.tapped import run_decoder
from qavp_export.passes import NVFP4
from qavp_export.settings import Settings

Verdict = Literal["PASS", "FAIL", "NOT COMPARED", "DECODER NOT RUN"]

# The graphs differ from torch by the order of float32 sums. Relative to the largest logit.
LOGITS_TOLERANCE = 1e-3
# That rounding moves an activation across a rounding boundary about once in 10^5 (measured on tiny models); wrong
# arithmetic moves most of them.
DIFFERING_CODES_TOLERANCE = 1e-3
# A group's multiplier may move too, from 1 to 2 at most doubling its step: half of the old plus half of the new.
STEPS_TOLERANCE = 1.6
# Of a weight and what GPTQ made of it, which may shrink it where its input is mostly noise; 0 for codes of another.
WEIGHT_COSINE_TOLERANCE = 0.5
# Two scores closer than this are a tie as far as float32 sums can tell.
SCORE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """What was compared and found.

    Attributes:
        verdict: PASS, FAIL, NOT COMPARED (too little memory) or DECODER NOT RUN (no engine here runs its format).
        reason: Why the verdict is not PASS; empty otherwise.
        compared: What the figures cover.
        max_abs: Largest absolute difference of logits.
        mean_abs: Mean absolute difference of logits.
        cosine: Cosine similarity of all logits as one vector.
        argmax_agreement: Fraction of positions with the same most likely token.
        codes_agreement: Fraction of quantized activations with the same code, layer by layer on the same input.
        weights_agreement: Fraction of quantized weights with the same code, where they are rounded to nearest.
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
    codes_agreement: float | None = None
    weights_agreement: float | None = None
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
    layers: list[DecoderLayer],
    read_weight: ReadWeight,
) -> Parity:
    """Compares the bundle's graphs with the reference on two random images and a padded batch of two prompts.

    Covers the vision encoder with scoring and selection, the embedding, a prefill with left padding and one decode
    step on the prefill's cache. ONNX Runtime cannot run FP4: of a decoder in NVFP4 the weights alone are compared.

    Args:
        checkpoint: The checkpoint folder.
        bundle: The folder that holds the graphs.
        manifest: The bundle's manifest, `parity` not yet filled in.
        plan: The model's sizes.
        settings: The recipe, with every choice made.
        layers: The decoder's linear layers.
        read_weight: Reads a decoder weight as it was before quantization, see `check_nvfp4_weights`.

    Returns:
        The figures and the verdict.

    Raises:
        ParityError: An FP4 weight differs.
    """
    needed, available = reference_bytes(checkpoint), _available_bytes()
    if needed > available:
        reason = f"the reference needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free"
        return Parity("NOT COMPARED", reason, "nothing")
    options, graph = EngineOptions(graph_optimization="disable"), bundle / manifest.components["decoder"].file
    if any(layer.precision == NVFP4 for layer in layers):
        # Without layers the reference keeps its own decoder.
        reference = Reference(checkpoint, plan, settings, [], graph)
        vision = _compare_vision(OrtEncoders(bundle, manifest, options), reference, plan, settings.recipe.seed)
        return _judge_encoders(vision, check_nvfp4_weights(graph, read_weight))
    engine = OrtCpuEngine(bundle, manifest, options)
    reference = Reference(checkpoint, plan, settings, layers, graph)
    vision = _compare_vision(engine, reference, plan, settings.recipe.seed)
    prompts = random_prompts(np.random.default_rng(settings.recipe.seed), plan, settings.tokens_kept)
    embeds = engine.embed(prompts.ids, vision.features)
    next_embeds = engine.embed(prompts.next_ids, vision.features[:0])
    taps = sorted({layer.activation for layer in layers if layer.activation is not None})
    actual = run_decoder(graph, embeds, next_embeds, prompts, taps)
    expected = reference.decode(prompts, vision.expected, actual.activations)
    valid = prompts.grown_mask.astype(bool)
    return _judge(actual.logits[valid], expected[valid], reference, vision)


@dataclass(frozen=True)
class _Vision:
    """The vision encoder's comparison; from here on both sides see the same tokens, so that a tie hides no difference.

    Attributes:
        features: The graph's surviving tokens `[B,k,D]`.
        expected: The reference's, at the same places.
        same_tokens: Fraction of kept indices that agree.
    """

    features: FloatArray
    expected: FloatArray
    same_tokens: float

    @property
    def max_abs(self) -> float:
        return float(np.max(np.abs(self.features - self.expected)))


def _compare_vision(encoders: Encoders, reference: Reference, plan: Plan, seed: int) -> _Vision:
    pixels = np.random.default_rng(seed).standard_normal((2, 3, *plan.image_size)).astype(np.float32)
    features, kept_indices = encoders.encode_images(pixels)
    kept, scores, unpruned = reference.vision(pixels)
    chosen = np.take_along_axis(unpruned, kept_indices[..., None], axis=1)
    return _Vision(features, chosen, _selection_agreement(kept_indices, kept, scores))


def _selection_agreement(actual: IntArray, expected: IntArray, scores: FloatArray) -> float:
    """Returns the fraction of equal kept indices; a swap of two tied tokens counts as equal."""
    equal = 0
    for ours, theirs, row in zip(actual, expected, scores, strict=True):
        threshold = row[theirs].min()
        tied = {int(token) for token in ours if abs(row[token] - threshold) <= SCORE_TOLERANCE}
        equal += len({int(token) for token in ours} & ({int(token) for token in theirs} | tied))
    return equal / actual.size


def _judge(actual: FloatArray, expected: FloatArray, reference: Reference, vision: _Vision) -> Parity:
    """Returns the verdict on logits `[tokens, V]`."""
    ours, theirs = actual.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(ours - theirs)
    norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    relative = float(difference.max() / max(float(np.abs(theirs).max()), 1e-30))
    cosine = reference.weights.smallest_cosine
    reasons = [*_different_tokens(vision), *_differences("weights", reference.weights.agreement)]
    reasons += _differences("activations", reference.activations)
    # `not x <= limit`, so that NaN fails.
    if not cosine >= WEIGHT_COSINE_TOLERANCE:
        reasons.append(f"a weight has cosine {cosine:.2f} with the checkpoint's")
    if not relative <= LOGITS_TOLERANCE:
        reasons.append(f"logits differ by {relative:.1e} of the largest")
    return Parity(
        verdict="FAIL" if reasons else "PASS",
        reason="; ".join(reasons),
        compared="complete graphs on 2 random images and 2 left-padded prompts: prefill and 1 decode step, every "
        "quantized activation on the same input, every quantized weight",
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine=float(np.sum(ours * theirs) / norms) if norms else 1.0,
        argmax_agreement=float(np.mean(actual.argmax(-1) == expected.argmax(-1))),
        codes_agreement=1 - _differing(reference.activations),
        weights_agreement=1 - _differing(reference.weights.agreement),
        features_max_abs=vision.max_abs,
        kept_indices_equal=vision.same_tokens,
    )


def _judge_encoders(vision: _Vision, weights: int) -> Parity:
    """Returns the verdict where the decoder cannot be run."""
    reasons = [*_different_tokens(vision)]
    return Parity(
        verdict="FAIL" if reasons else "DECODER NOT RUN",
        reason="; ".join(reasons)
        or f"no engine here runs NVFP4; {weights} FP4 weights equal the reference bit for bit",
        compared="the vision encoder on 2 random images, every FP4 weight",
        weights_agreement=1.0,
        features_max_abs=vision.max_abs,
        kept_indices_equal=vision.same_tokens,
    )


def _different_tokens(vision: _Vision) -> Iterator[str]:
    if vision.same_tokens < 1:
        yield f"{1 - vision.same_tokens:.1%} of the kept tokens differ beyond ties"


def _differences(what: str, agreement: Agreement) -> Iterator[str]:
    if not _differing(agreement) <= DIFFERING_CODES_TOLERANCE:
        yield f"{_differing(agreement):.2%} of the quantized {what} differ"
    if not agreement.worst <= STEPS_TOLERANCE:
        yield f"quantized {what} are off by up to {agreement.worst:.1f} steps"


def _differing(agreement: Agreement) -> float:
    return agreement.differing / max(agreement.compared, 1)


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
