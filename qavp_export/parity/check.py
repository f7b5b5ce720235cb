"""The parity check and its verdict."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qavp_export.engines import EngineOptions, FloatArray, IntArray, load_engine
from qavp_export.families import Plan
from qavp_export.manifest import Manifest
from qavp_export.parity.prompts import random_prompts
from qavp_export.parity.reference import CodeAgreement, QuantizedLayer, Reference
from qavp_export.parity.tapped import run_decoder
from qavp_export.settings import Settings

Verdict = Literal["PASS", "FAIL", "NOT COMPARED"]

# The graphs differ from torch by the order of float32 sums. Relative to the largest logit.
LOGITS_TOLERANCE = 1e-3
# That rounding moves an activation across a rounding boundary about once in 10^5 (measured on tiny models); wrong
# arithmetic moves most of them.
DIFFERING_CODES_TOLERANCE = 1e-3
# A group's multiplier may move too, from 1 to 2 at most doubling its step: half of the old plus half of the new.
STEPS_TOLERANCE = 1.6
# Two scores closer than this are a tie as far as float32 sums can tell.
SCORE_TOLERANCE = 1e-5


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
        codes_agreement: Fraction of quantized activations with the same code, layer by layer on the same input.
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
    layers: list[QuantizedLayer],
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
        layers: The decoder's quantized linear layers.

    Returns:
        The figures and the verdict.
    """
    needed, available = _reference_bytes(checkpoint), _available_bytes()
    if needed > available:
        reason = f"the reference needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free"
        return Parity("NOT COMPARED", reason, "nothing")
    engine = load_engine("ort-cpu", bundle, manifest, EngineOptions(graph_optimization="disable"))
    reference = Reference(checkpoint, plan, settings, layers)
    rng = np.random.default_rng(settings.recipe.seed)
    pixels = rng.standard_normal((2, 3, *plan.image_size)).astype(np.float32)

    image_features, kept_indices = engine.encode_images(pixels)
    kept, scores, features = reference.vision(pixels)
    same_tokens = _selection_agreement(kept_indices, kept, scores)
    # From here on both sides see the same tokens, so that a tie does not hide a difference.
    chosen = np.take_along_axis(features, kept_indices[..., None], axis=1)
    features_max_abs = float(np.max(np.abs(chosen - image_features)))

    prompts = random_prompts(rng, plan, settings.tokens_kept)
    embeds = engine.embed(prompts.ids, image_features)
    next_embeds = engine.embed(prompts.next_ids, image_features[:0])
    taps = sorted({layer.activation for layer in layers if layer.activation is not None})
    actual = run_decoder(bundle / manifest.components["decoder"].file, embeds, next_embeds, prompts, taps)
    expected, codes = reference.decode(prompts, chosen, actual.activations)
    valid = prompts.grown_mask.astype(bool)
    return _judge(actual.logits[valid], expected[valid], codes, same_tokens, features_max_abs)


def _selection_agreement(actual: IntArray, expected: IntArray, scores: FloatArray) -> float:
    """Returns the fraction of equal kept indices; a swap of two tied tokens counts as equal."""
    equal = 0
    for ours, theirs, row in zip(actual, expected, scores, strict=True):
        threshold = row[theirs].min()
        tied = {int(token) for token in ours if abs(row[token] - threshold) <= SCORE_TOLERANCE}
        equal += len({int(token) for token in ours} & ({int(token) for token in theirs} | tied))
    return equal / actual.size


def _judge(
    actual: FloatArray, expected: FloatArray, codes: CodeAgreement, same_tokens: float, features_max_abs: float
) -> Parity:
    """Returns the verdict on logits `[tokens, V]`."""
    ours, theirs = actual.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(ours - theirs)
    norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    relative = float(difference.max() / max(float(np.abs(theirs).max()), 1e-30))
    differing = codes.differing / max(codes.compared, 1)
    # `not x <= limit`, so that NaN fails.
    findings = {
        f"{1 - same_tokens:.1%} of the kept tokens differ beyond ties": same_tokens < 1,
        f"{differing:.2%} of the 4-bit activations differ": not differing <= DIFFERING_CODES_TOLERANCE,
        f"a 4-bit activation is off by {codes.worst:.1f} steps": not codes.worst <= STEPS_TOLERANCE,
        f"logits differ by {relative:.1e} of the largest": not relative <= LOGITS_TOLERANCE,
    }
    reasons = [reason for reason, found in findings.items() if found]
    return Parity(
        verdict="FAIL" if reasons else "PASS",
        reason="; ".join(reasons),
        compared="complete graphs on 2 random images and 2 left-padded prompts: prefill and 1 decode step, every "
        "quantized activation on the same input",
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine=float(np.sum(ours * theirs) / norms) if norms else 1.0,
        argmax_agreement=float(np.mean(actual.argmax(-1) == expected.argmax(-1))),
        codes_agreement=1 - differing,
        features_max_abs=features_max_abs,
        kept_indices_equal=same_tokens,
    )


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
