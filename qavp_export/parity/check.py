"""The parity check and its verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qavp_export.engines import FloatArray
from qavp_export.engines.ort.encoders import OrtEncoders
from qavp_export.memory import release_memory
from qavp_export.parity.decoders import PLAIN, Comparison, Exported, compare_complete, compare_layers
from qavp_export.parity.layers import Agreement
from qavp_export.parity.loading import drop_vision, has_module, load_reference
from qavp_export.parity.nvfp4 import ReadWeight, check_nvfp4_weights
from qavp_export.parity.question import QuestionReference
from qavp_export.parity.truncated import truncated_decoder
from qavp_export.parity.vision import VisionReference
from qavp_export.passes import NVFP4

Verdict = Literal["PASS", "FAIL", "DECODER NOT RUN"]

# Tensors of a checkpoint that is loaded whole.
WHOLE_BYTES = 1 << 30
# Of a larger one, the decoder's layers that are.
FIRST_LAYERS = 2
_STEPS = (
    "2 random images and 2 left-padded prompts: prefill and 1 decode step, every quantized activation on the same "
    "input, every quantized weight"
)
_COMPLETE = f"complete graphs on {_STEPS}"
_LAYER_BY_LAYER = (
    f"vision encoder, embedding and the decoder cut to its first {FIRST_LAYERS} layers, complete, on {_STEPS}; then "
    "all layers of the decoder, one by one, in a prefill: every quantized activation on the same input, every "
    "quantized weight by what it makes of random vectors"
)

# The graphs differ from torch by the order of float32 sums. Relative to the largest logit.
LOGITS_TOLERANCE = 1e-3
# That rounding moves an activation across a rounding boundary about once in 10^5 (measured on tiny models); wrong
# arithmetic moves most of them.
DIFFERING_CODES_TOLERANCE = 1e-3
# A group's multiplier may move too, from 1 to 2 at most doubling its step: half of the old plus half of the new.
STEPS_TOLERANCE = 1.6


@dataclass(frozen=True)
class Parity:
    """What was compared and found.

    Attributes:
        verdict: PASS, FAIL or DECODER NOT RUN (no engine here runs its format).
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
    exported: Exported, read_weight: ReadWeight, work: Path, progress: Callable[[int, int], None]
) -> Parity:
    """Compares the bundle's graphs with the reference on two random images and a padded batch of two prompts.

    Covers the vision encoder with scoring and selection, the embedding, a prefill with left padding and one decode
    step on the prefill's cache. A model of more than `WHOLE_BYTES` is never loaded whole: its first two layers are run
    like that, and then all layers, one by one, in a prefill. ONNX Runtime cannot run FP4: of a decoder in NVFP4 the
    weights alone are compared.

    Args:
        exported: The export.
        read_weight: Reads a decoder weight as it was before quantization, see `check_nvfp4_weights`.
        work: A folder for what is kept on disk meanwhile.
        progress: Called with steps done and steps in all.

    Returns:
        The figures and the verdict.

    Raises:
        ParityError: An FP4 weight differs.
    """
    whole = exported.checkpoint.total_bytes <= WHOLE_BYTES
    if any(layer.precision == NVFP4 for layer in exported.layers):
        model = load_reference(exported.checkpoint.folder, (), None if whole else 0)
        vision = _compare_vision(exported, model)
        return _judge_encoders(vision, check_nvfp4_weights(exported.decoder, read_weight))
    if whole:
        model = load_reference(exported.checkpoint.folder, exported.modules)
        vision = _compare_vision(exported, model)
        complete = compare_complete(exported, exported.decoder, model, vision.features, vision.expected)
        return _judge(vision, [complete], _COMPLETE)
    vision, complete = _compare_first_layers(exported)
    release_memory()
    layers = compare_layers(exported, vision.features, work, progress)
    return _judge(vision, [complete, layers], _LAYER_BY_LAYER)


def _compare_first_layers(exported: Exported) -> tuple[_Vision, Comparison]:
    """Compares the vision encoder, and a copy of the decoder that has only its first layers."""
    # One that has no second layer would get a random one.
    count = min(FIRST_LAYERS, exported.plan.num_layers)
    model = load_reference(exported.checkpoint.folder, exported.modules, count)
    vision = _compare_vision(exported, model)
    first = dataclasses.replace(
        exported,
        plan=dataclasses.replace(exported.plan, num_layers=count),
        layers=[layer for layer in exported.layers if has_module(model, layer.module)],
    )
    with truncated_decoder(exported.decoder, count) as graph:
        return vision, compare_complete(first, graph, model, vision.features, vision.expected)


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


def _compare_vision(exported: Exported, model: Any) -> _Vision:
    """Compares the vision encoder; the model's is gone afterwards."""
    question = None if exported.text_tower is None else QuestionReference.load(exported.text_tower)
    reference = VisionReference(model, exported.family, exported.plan, exported.settings, question)
    draws = [(arguments, reference.select(arguments)) for arguments in reference.draw(exported.settings.recipe.seed)]
    # One after the other: each takes about the memory of the whole tower.
    drop_vision(model, exported.family)
    if question is not None:
        question.drop()
    release_memory()
    encoders = OrtEncoders(exported.bundle, exported.manifest, PLAIN)
    features, expected, same_tokens = [], [], []
    for arguments, selection in draws:
        kept_features, kept = encoders.encode_images(reference.feeds(arguments, selection))
        features.append(kept_features)
        expected.append(np.take_along_axis(selection.features, kept[..., np.newaxis], axis=1))
        same_tokens.append(reference.agreement(selection, kept))
    return _Vision(np.concatenate(features), np.concatenate(expected), float(np.mean(same_tokens)))


def _judge(vision: _Vision, decoders: list[Comparison], compared: str) -> Parity:
    """Returns the verdict; the figures are those of all decoders together."""
    reasons = list(_different_tokens(vision))
    differences, cosines, same = [], [], []
    activations, weights = Agreement(), Agreement()
    for decoder in decoders:
        ours, theirs = decoder.actual.astype(np.float64), decoder.expected.astype(np.float64)
        differences.append(np.abs(ours - theirs))
        relative = float(differences[-1].max() / max(float(np.abs(theirs).max()), 1e-30))
        norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
        cosines.append(float(np.sum(ours * theirs) / norms) if norms else 1.0)
        same.append(float(np.mean(ours.argmax(-1) == theirs.argmax(-1))))
        reasons += decoder.weights.wrong[:1]
        # `not x <= limit`, so that NaN fails.
        if not relative <= LOGITS_TOLERANCE:
            reasons.append(f"logits differ by {relative:.1e} of the largest")
        activations.merge(decoder.activations)
        weights.merge(decoder.weights.agreement)
    reasons += [*_differences("weights", weights), *_differences("activations", activations)]
    return Parity(
        verdict="FAIL" if reasons else "PASS",
        reason="; ".join(reasons),
        compared=compared,
        max_abs=max(float(difference.max()) for difference in differences),
        mean_abs=float(np.mean([difference.mean() for difference in differences])),
        cosine=min(cosines),
        argmax_agreement=min(same),
        codes_agreement=1 - _differing(activations),
        weights_agreement=1 - _differing(weights),
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
