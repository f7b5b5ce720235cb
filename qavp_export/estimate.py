"""What an export will yield, from config.json alone: nothing is read but the configuration."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from qavp_export.families import Family, Plan
from qavp_export.families.question import QuestionRelevance
from qavp_export.parity.check import FIRST_LAYERS, WHOLE_BYTES
from qavp_export.passes import SCHEMES
from qavp_export.quantization import precision_of
from qavp_export.recipe import Precision
from qavp_export.settings import Settings
from qavp_export.tracing import build_clip_skeleton, build_skeleton

# Interpreter, torch, transformers and the traced graphs (measured on the demo model).
_BASE_BYTES = 960_000_000
# Of the largest weight, while it is rotated and quantized (10.1 measured at LLaVA-1.5-7B's widths, rounded up).
_BYTES_PER_ELEMENT_IN_FLIGHT = 11
_LAYER = re.compile(r"layers\.\d+\.")


@dataclass(frozen=True)
class Estimate:
    """The plan that `--dry-run` prints.

    Attributes:
        vision_tokens_before: Vision tokens from the projector of what is pruned at once (N); None: varies.
        vision_tokens_after: Those of them that reach the decoder (k); None: varies, or chosen by the call.
        keep: Fraction kept, unless a call asks for another.
        keep_range: The fractions that a call may ask for; None: no other.
        semantic: Semantic scorer.
        group_size: Channels that share a scale.
        decoder_layers: Decoder layers.
        linears: Number of linear layers by precision.
        parameters: Parameters of the model.
        checkpoint_bytes: Size of the checkpoint's tensors.
        bundle_bytes: Size of the bundle's graphs and weights.
        peak_memory_bytes: Peak memory of the export.
    """

    vision_tokens_before: int | None
    vision_tokens_after: int | None
    keep: float
    keep_range: tuple[float, float] | None
    semantic: str
    group_size: int
    decoder_layers: int
    linears: dict[str, int]
    parameters: int
    checkpoint_bytes: int
    bundle_bytes: int
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def estimate(config: Any, family: Family, plan: Plan, settings: Settings, clip: Any = None) -> Estimate:
    """Estimates an export.

    Args:
        config: The Hugging Face configuration.
        family: The model's family.
        plan: The model's sizes.
        settings: The recipe, with every choice made.
        clip: The `CLIPConfig` of the text tower that the scorer `text` reads the question with; None: no such scorer.
    """
    skeleton, mode = build_skeleton(config)
    stored = 4 if str(getattr(config, "dtype", None) or "float16").endswith("float32") else 2
    decoder = family.decoder(skeleton)
    quantized = 0
    precisions: Counter[str] = Counter()
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            precision = precision_of(name, settings.recipe)
            quantized += _linear_bytes(module, precision, settings, stored)
            precisions[precision] += 1
    in_decoder = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    rest = sum(
        parameter.numel() * (stored if parameter.dim() > 1 else 4)
        for module in skeleton.modules()
        if id(module) not in in_decoder
        for parameter in module.parameters(recurse=False)
    )
    sizes = [parameter.numel() for parameter in skeleton.parameters()]
    stored_bytes = sum(sizes) * stored
    in_layers = sum(p.numel() for name, p in decoder.named_parameters() if _LAYER.search(name)) * stored
    compared = stored_bytes
    if stored_bytes > WHOLE_BYTES:
        compared -= in_layers * max(plan.num_layers - FIRST_LAYERS, 0) // plan.num_layers
    if clip is not None:
        tower = build_clip_skeleton(clip, mode)
        rest += sum(p.numel() * (stored if p.dim() > 1 else 4) for p in QuestionRelevance(tower).parameters())
        # PyTorch's side of the comparison, in float32.
        compared += 4 * sum(p.numel() for p in tower.parameters())
    peak = _BASE_BYTES + max(_BYTES_PER_ELEMENT_IN_FLIGHT * max(sizes), compared)
    return Estimate(
        vision_tokens_before=plan.vision_tokens,
        vision_tokens_after=settings.tokens_kept,
        keep=settings.recipe.keep,
        keep_range=settings.recipe.keep_range,
        semantic=settings.semantic,
        group_size=settings.group_size,
        decoder_layers=plan.num_layers,
        linears=dict(precisions),
        parameters=sum(sizes),
        checkpoint_bytes=stored_bytes,
        bundle_bytes=quantized + rest,
        peak_memory_bytes=peak,
    )


def _linear_bytes(module: nn.Linear, precision: Precision, settings: Settings, stored: int) -> int:
    elements, outputs = module.weight.numel(), module.out_features
    groups = elements // settings.group_size
    bias = 4 * outputs if module.bias is not None else 0
    if settings.recipe.format == "nvfp4" and precision == "w4a4":
        return elements // 2 + elements // 16 + bias
    scheme = SCHEMES.get(precision)
    if scheme is None:
        return elements * stored + bias
    if scheme.weights == "int8":
        return elements + 4 * (outputs if scheme.activations == "int8" else groups) + bias
    if settings.recipe.scales == "two-level":
        return elements // 2 + groups // 2 + 4 * outputs + bias
    return elements // 2 + 4 * groups + bias
