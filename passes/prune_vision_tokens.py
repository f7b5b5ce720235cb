"""Prunes vision tokens inside any vision graph."""

from __future__ import annotations

import onnx_ir as ir

from qavp_export.numerics.score import PAPER_ALPHA, PAPER_OUTLIER_WEIGHT, ScoreInput
from qavp_export.numerics.select import Select
from qavp_export.numerics.semantic import Scorer
from qavp_export.passes._infra import RewritePass, RewriteResult
from qavp_export.passes.hybrid_score import InsertHybridScore
from qavp_export.passes.select_gather import SelectGather


class PruneVisionTokens(RewritePass):
    """Keeps k tokens of image features `[B,N,D]`: `InsertHybridScore`, then `SelectGather`.

    Works on any ONNX vision graph, opset 18 or newer, with a static grid or, with `tokens` or `keep_input`, one of
    named axes::

        import onnx_ir as ir
        from qavp_export.passes import PruneVisionTokens

        model = ir.load("vision.onnx")
        result = PruneVisionTokens(at="image_features", keep=0.125)(model)
        ir.save(result.model, "vision_pruned.onnx")

    The output `image_features` is then `[B,k,D]`, and a new output `kept_indices [B,k]` (INT64) tells which
    tokens of the grid they are, in raster order. With `keep_input`, a new input `keep_tokens [1]` (INT64) says what k
    is, call by call.

    Args:
        at: Name of the image features.
        keep: The fraction kept, in (0, 1]; give this, `tokens` or `keep_input`.
        tokens: The number kept, k.
        semantic: Semantic scorer: `cls` (towers with a [CLS] token), `received`, `norm`, `random`, or `text`
            (graphs that compute relevance to a question, see `InsertHybridScore`).
        alpha: Weight of the semantic relevance, in [0, 1]; 1 is semantic pruning alone.
        group_size: Channels per simulated INT4 group; None for the largest of 128, 64, 32, 16 that fits D.
        score_input: `raw` or `rms`.
        seed: Seed of the scorer `random`.
        select: `topk`, `dpp` or `maxmin`.
        keep_input: Take k from the graph input `keep_tokens`.
        outlier_weight: Weight of the outlier intensity against the quantization error, in [0, 1].

    Raises:
        InputError: A setting is out of range.
        GraphError: When called: the graph lacks what is needed. It is unchanged then, except for shapes that
            were inferred.
    """

    def __init__(
        self,
        at: str = "image_features",
        keep: float | None = None,
        tokens: int | None = None,
        semantic: Scorer = "cls",
        alpha: float = PAPER_ALPHA,
        group_size: int | None = None,
        score_input: ScoreInput = "raw",
        seed: int = 0,
        select: Select = "topk",
        *,
        keep_input: bool = False,
        outlier_weight: float = PAPER_OUTLIER_WEIGHT,
    ) -> None:
        self._score = InsertHybridScore(at, semantic, alpha, group_size, score_input, seed, outlier_weight)
        self._select = SelectGather(at, keep=keep, tokens=tokens, select=select, keep_input=keep_input)

    def requires(self, model: ir.Model) -> None:
        """Checks what both passes require, so that neither runs if one cannot."""
        self._score.requires(model)
        self._select.check_features(model)

    def call(self, model: ir.Model) -> RewriteResult:
        """Runs both passes."""
        # A selection that cannot be made must fail before the score is in the graph.
        self._select.plan(model)
        scored = self._score(model)
        selected = self._select(scored)
        refused = [*scored.refused, *selected.refused]
        return RewriteResult(model, modified=True, matched=selected.matched, refused=refused)
