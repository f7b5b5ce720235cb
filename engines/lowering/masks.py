"""Tells what an attention mask lets through, by running the nodes that compute it on a few prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qavp_export.engines import TOKEN_TYPES

Bools = NDArray[np.bool_]

_TYPES: Mapping[ir.DataType, type[np.generic]] = MappingProxyType(
    {ir.DataType.FLOAT: np.float32, ir.DataType.INT64: np.int64}
)
# Longest prompt that is tried.
_LONGEST = 2048
_FATAL = 4


@dataclass(frozen=True)
class MaskKind:
    """What a mask lets a text token see.

    Attributes:
        causal: Every key up to the query's own that is no padding, within the window, vision tokens like any others.
        window: Number of last keys that are seen, the query's own among them; None: all.
    """

    causal: bool
    window: int | None


@dataclass(frozen=True)
class _Prompt:
    """A batch: mask `[B,past+S]`, its last S positions new; all of them are text, or all vision tokens."""

    mask: NDArray[np.int64]
    past: int
    vision: bool = False

    def expected(self, window: int | None) -> Bools:
        """Returns what a causal mask lets through `[B,1,S,past+S]`."""
        total = self.mask.shape[1]
        keys, queries = np.arange(total)[None, :], np.arange(self.past, total)[:, None]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        let_through: Bools = seen[None, None] & (self.mask[:, None, None, :] == 1)
        return let_through


def classify_masks(model: ir.Model, masks: Sequence[ir.Value], context_length: int) -> dict[str, MaskKind]:
    """Tells what masks of a canonical decoder let through.

    Args:
        model: The decoder; it is not changed.
        masks: `[B,1,S,T]`, true or zero where a key is seen, false or very negative where not.
        context_length: Most tokens of a sequence.

    Returns:
        The kind of each mask, by name.
    """
    run = _Masks(model, [str(mask.name) for mask in masks])
    last = run(_Prompt(np.ones((1, context_length), np.int64), context_length - 1))
    kinds = {}
    windows = {name: int(seen.sum()) for name, seen in last.items()}
    for name, seen in windows.items():
        window = None if seen == context_length else seen
        longest = min(_LONGEST, context_length) if window is None else min(window + 3, _LONGEST, context_length)
        prompts = [_padded(longest, 0), _padded(min(longest, 40), 0), _padded(1, min(longest, context_length - 1))]
        prompts.append(dataclasses.replace(prompts[1], vision=True))
        causal = all(_agree(run(prompt)[name], prompt, window) for prompt in prompts)
        kinds[name] = MaskKind(causal, window)
    return kinds


def _padded(new: int, past: int) -> _Prompt:
    """Returns two sequences, the second with padding in front."""
    mask = np.ones((2, past + new), np.int64)
    mask[1, : (past + new) // 3] = 0
    return _Prompt(mask, past)


def _agree(seen: Bools, prompt: _Prompt, window: int | None) -> bool:
    expected = np.broadcast_to(prompt.expected(window), (len(prompt.mask), 1, *seen.shape[2:]))
    # What padding sees does not matter.
    matters = prompt.mask[:, None, prompt.past :, None] == 1
    return not bool(np.any((np.broadcast_to(seen, expected.shape) != expected) & matters))


class _Masks:
    """The nodes of a decoder that compute its masks."""

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        part = model.clone()
        by_name = {value.name: value for node in part.graph for value in node.outputs}
        part.graph.outputs[:] = [by_name[name] for name in names]
        RemoveUnusedNodesPass()(part)
        for value in list(part.graph.inputs):
            if not value.uses():
                part.graph.inputs.remove(value)
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        serialized = ir.to_proto(part).SerializeToString()
        self._session = ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        self._inputs = {str(value.name): value for value in part.graph.inputs}
        self._names = names

    def __call__(self, prompt: _Prompt) -> dict[str, Bools]:
        """Returns what each mask lets through."""
        feeds = {name: self._feed(name, value, prompt) for name, value in self._inputs.items()}
        masks = self._session.run(list(self._names), feeds)
        return {
            name: mask if mask.dtype == np.bool_ else mask > np.finfo(np.float32).min / 2
            for name, mask in zip(self._names, masks, strict=True)
        }

    def _feed(self, name: str, value: ir.Value, prompt: _Prompt) -> NDArray[Any]:
        rows, total = prompt.mask.shape
        if name == "attention_mask":
            return prompt.mask
        if name == "position_ids":
            positions: NDArray[np.int64] = np.maximum(prompt.mask.cumsum(axis=1) - 1, 0)
            return positions[:, prompt.past :]
        sizes = {"batch": rows, "sequence": total - prompt.past, "past": prompt.past, "total": total}
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape or ()]
        of_vision = prompt.vision and name == TOKEN_TYPES
        return np.full(shape, int(of_vision), _TYPES[value.dtype or ir.DataType.FLOAT])
