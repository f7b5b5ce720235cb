"""Optimization profiles: the smallest, the usual and the largest input shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx_ir as ir

from qavp_export.engines.tensorrt.keys import Profiles
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import InputError
from qavp_export.manifest import VisionTokens
from qavp_export.numerics.select import tokens_to_keep

KEEP_TOKENS = "keep_tokens"
# Pictures that go through the vision encoder at once, where each is a unit; more go in several runs.
_PICTURES = 8
# Most tokens of prompt and answer, unless more are asked for: TensorRT's attention reads all of a cache's memory.
_CAPACITY = 2048
# Tokens of a prompt beside its image, as far as speed goes.
_TEXT = 64
# Tokens of a question that image tokens are scored by.
_QUESTION = 16
# Longest side of an image in its own resolution, where the processor's settings do not say.
_LONGEST_SIDE = 1024


@dataclass(frozen=True)
class Span:
    """Least, usual and greatest value of something."""

    least: int
    usual: int
    most: int

    @classmethod
    def of(cls, usual: int, most: int, least: int = 1) -> Span:
        """Returns a span that holds together."""
        return cls(least, min(max(usual, least), most), most)


# Shapes by input, or values where an input is read as sizes: least, usual and greatest.
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def settle_profiles(targets: EngineTargets, context_length: int, tokens_kept: int | None) -> Profiles:
    """Returns the largest shapes of the decoder.

    Args:
        targets: What is built.
        context_length: Most tokens of a sequence.
        tokens_kept: Tokens of a unit that survive (k); None if they vary.

    Raises:
        InputError: The model's context is shorter than that, or there is no room for an image.
    """
    tokens = min(context_length, _CAPACITY) if targets.max_tokens is None else targets.max_tokens
    if tokens > context_length:
        raise InputError(f"--max-tokens is {tokens}; the model's context has {context_length} tokens")
    if targets.max_tokens is not None and (tokens_kept or 0) >= tokens:
        raise InputError(f"--max-tokens is {tokens}; an image alone takes {tokens_kept}: give more, or a lower --keep")
    return Profiles(max_prompt=tokens, capacity=tokens, max_batch=targets.max_batch)


def decoder_profiles(model: ir.Model, limits: Profiles, tokens: VisionTokens) -> list[Profile]:
    """Returns the profile for prompts and that for single tokens."""
    batch = Span.of(1, limits.max_batch)
    prompt = Span.of((tokens.after or _TEXT) + _TEXT, limits.max_prompt)
    one = Span(1, 1, 1)
    phases = ({"sequence": prompt, "rows": Span(1, 1, limits.max_prompt)}, {"sequence": one, "rows": one})
    return [_profile(model.graph.inputs, {"batch": batch, **sizes}) for sizes in phases]


def embedding_profiles(model: ir.Model, limits: Profiles, tokens: VisionTokens) -> list[Profile]:
    """Returns the profile of the embedding, for prompts and single tokens."""
    if tokens.after is None:
        units, each = Span(1, 1, limits.max_batch), Span.of(_TEXT, limits.max_prompt * limits.max_batch)
    else:
        units = Span.of(1, max(1, limits.max_batch * limits.max_prompt // tokens.after))
        each = Span(tokens.after, tokens.after, tokens.after)
    sizes = {
        "batch": Span.of(1, limits.max_batch),
        "sequence": Span.of((tokens.after or _TEXT) + _TEXT, limits.max_prompt),
        "images": units,
        "tokens_per_image": each,
    }
    return [_profile(model.graph.inputs, sizes)]


def vision_profiles(model: ir.Model, tokens: VisionTokens, longest_side: int | None) -> list[Profile]:
    """Returns the profile of the vision encoder.

    Args:
        model: The vision encoder.
        tokens: The manifest's vision tokens.
        longest_side: Of an image in its own resolution, pixels; None: 1024.
    """
    sizes, candidates = _vision_sizes(tokens, longest_side or _LONGEST_SIDE)
    kept = {"keep_tokens": Span(1, max(1, tokens_to_keep(candidates.usual, tokens.keep)), candidates.most)}
    return [_profile(model.graph.inputs, sizes, kept)]


def _vision_sizes(tokens: VisionTokens, longest_side: int) -> tuple[dict[str, Span], Span]:
    """Returns the sizes of the vision encoder's inputs, and how many tokens are chosen from."""
    settings = tokens.layout_settings
    if tokens.layout == "tiles":
        side, patches = settings["tile_size"], settings["tile_patches"]
        grids = [(height // side, width // side) for height, width in settings["grid_pinpoints"]]
        tiles = Span.of(1 + max(prod(grid) for grid in grids), 1 + max(prod(grid) for grid in grids))
        # A picture of the whole, and a grid with a token behind each row.
        most = patches**2 + max(rows * patches * (columns * patches + 1) for rows, columns in grids)
        found = Span.of(most, most)
        return {"tiles": tiles, "tokens": found}, found
    if tokens.layout == "native":
        cell = settings["patch_size"] * settings["spatial_merge_size"]
        most = max(longest_side // cell, 1)
        usual = max(most // 2, 1)
        side = Span(cell, usual * cell, most * cell)
        return {"height": side, "width": side}, Span(1, usual**2, most**2)
    count = tokens.before or 1
    sizes = {"batch": Span.of(1, _PICTURES)}
    if tokens.question is not None:
        sizes["text_tokens"] = Span.of(_QUESTION, tokens.question.context_length)
    return sizes, Span(1, count, count)


def _profile(
    inputs: Iterable[ir.Value], sizes: Mapping[str, Span], values: Mapping[str, Span] | None = None
) -> Profile:
    """Returns the profile of a graph; inputs of one shape are left out.

    Args:
        inputs: The graph's inputs.
        sizes: Of dynamic axes, by name.
        values: Of inputs that hold one number, by name.
    """
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for value in inputs:
        name, shape = str(value.name), tuple(value.shape or ())
        span = (values or {}).get(name)
        if span is not None:
            profile[name] = ((span.least,), (span.usual,), (span.most,))
        elif any(not isinstance(size, int) for size in shape):
            least, usual, most = (_sizes(shape, sizes, bound) for bound in ("least", "usual", "most"))
            profile[name] = (least, usual, most)
    return profile


def _sizes(shape: Sequence[Any], sizes: Mapping[str, Span], bound: str) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else getattr(sizes[str(size)], bound) for size in shape)
