"""The plugins that score image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from qavp_export.engines.kernels.score import (
    default_tiling,
    mix_token_score_spec,
    token_sensitivity_spec,
)
from qavp_export.engines.tensorrt.functions import MIX_TOKEN_SCORE, TOKEN_SENSITIVITY
from qavp_export.engines.tensorrt.plugins.plugin import Compiler, Launch, Plugin, Setting, Tensor
from qavp_export.numerics.score import ScoreInput

# Tokens for which the kernel is cut in each of its ways.
_FEW, _MANY = 1, 1 << 16


class TokenSensitivity(Plugin):
    """`features [B,N,D]` -> `error [B,N]`, `outlier [B,N]`; a tactic is the token count that the tiling is made for."""

    name = TOKEN_SENSITIVITY
    inputs = ("features",)
    settings = MappingProxyType({"group_size": int, "rms": int})
    outputs = ("FLOAT", "FLOAT")

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns the features' shape without channels, twice."""
        del settings
        (features,) = inputs
        return [tuple(features[:-1]), tuple(features[:-1])]

    def tactics(self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], compiler: Compiler) -> list[int]:
        """Returns a token count for each tiling, and the usual one."""
        del compiler
        (features,) = inputs
        width, score_input = features.size(-1), _score_input(settings)
        tilings = {default_tiling(rows, width, score_input): rows for rows in (_FEW, _MANY, features.usual_rows)}
        return sorted(tilings.values())

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `token_sensitivity`."""
        (features,) = inputs
        width, score_input = features.size(-1), _score_input(settings)
        tiling = default_tiling(tactic, width, score_input)
        spec = token_sensitivity_spec(features.dtype, width, int(settings["group_size"]), score_input, tiling)
        return Launch(compiler(spec), (cdiv(features.rows, tiling.tokens), 1, 1), (features.rows,))


class MixTokenScore(Plugin):
    """`error`, `outlier` and `semantic [B,N]` -> `score [B,N]`."""

    name = MIX_TOKEN_SCORE
    inputs = ("error", "outlier", "semantic")
    settings = MappingProxyType({"alpha": float, "outlier_weight": float})
    outputs = ("FLOAT",)

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns the shape of the first input."""
        del settings
        return [tuple(inputs[0])]

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `mix_token_score`."""
        del tactic, cdiv
        error = inputs[0]
        tokens = error.sizes[-1] if error.sizes[-1] > 0 else None
        spec = mix_token_score_spec(tokens, float(settings["alpha"]), float(settings["outlier_weight"]))
        return Launch(compiler(spec), (error.rows, 1, 1), (error.exprs[-1],))


def _score_input(settings: Mapping[str, Setting]) -> ScoreInput:
    return "rms" if settings["rms"] else "raw"
