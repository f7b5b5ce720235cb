"""Scores image tokens behind the vision projector."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qavp_export.errors import GraphError, InputError
from qavp_export.numerics.groups import largest_group_size
from qavp_export.numerics.score import PAPER_ALPHA, PAPER_OUTLIER_WEIGHT, ScoreInput, check_score_settings
from qavp_export.numerics.semantic import Scorer
from qavp_export.passes import semantic as scorers
from qavp_export.passes._attention import FusedAttention, OpenAttention, attention_upstream
from qavp_export.passes._builder import Dim, NodeBuilder
from qavp_export.passes._infra import (
    RewritePass,
    RewriteResult,
    find_value,
    insert_behind,
    require_features,
    require_free_name,
    require_opset,
    token_grid,
    with_shapes,
)
from qavp_export.passes.functions import (
    DOMAIN,
    HYBRID_TOKEN_SCORE,
    add_function,
    hybrid_token_score,
    token_norm,
)
from qavp_export.passes.relevance import (
    PATCH_RELEVANCE,
    check_relevance,
    connect_relevance,
    drop_relevance,
    patch_grid,
    relevance_ports,
    take_relevance,
)

MINIMUM_OPSET = 18
SCORE = f"/prune/score/{HYBRID_TOKEN_SCORE}_output_0"
PLUGIN_NAMESPACE = "qavp"
PLUGIN_VERSION = "1"


@dataclass(frozen=True)
class _Plan:
    tokens: Dim
    width: int
    group_size: int
    site: FusedAttention | OpenAttention | None
    images: Dim
    prefix: int


class InsertHybridScore(RewritePass):
    """Adds the hybrid score of image features `[B,N,D]` as the value `SCORE`, `[B,N]` FLOAT.

    1. The semantic scorer's nodes, named `/prune/semantic/...`. `cls` and `received` read the last attention
       that the features depend on: queries and keys of an `Attention` (or ONNX Runtime's
       `MultiHeadAttention`), or the Softmax of one that is written out. One token more than N is a [CLS].
    2. One node `/prune/score/HybridTokenScore` of domain `qavp`: a model-local function of standard
       operators. Its attributes `plugin_namespace`, `plugin_version` and `aot` let TensorRT run a plugin in
       its place.

    Where tokens are not the tower's patches, the graph says how relevance gets from one to the other: it has an input
    `patch_relevance [T,P]`, which the scorer's nodes replace, and an output `token_relevance [B,N]`, which is scored.
    Both go; so do the nodes between them if the scorer reads no attention. The scorer `text` adds no nodes: the graph
    itself compares its tokens with a question, and its output `token_relevance [B,N]` is scored and goes.

    Nothing else changes. No weight is read; weights may be without data. D must be static; batch, N and the
    attention's tokens need not be (then N has a name, and the tower no [CLS]). Any opset from 18 on will do.
    Features must be finite and below 1e15 in magnitude: an image with others gets meaningless scores, and other
    images of the batch are unaffected.

    Args:
        at: Name of the image features: what the projector computes, or a graph input.
        semantic: Semantic scorer: `cls`, `received`, `norm`, `random` or `text`.
        alpha: Weight of the semantic relevance, in [0, 1].
        group_size: Channels per simulated INT4 group; None for the largest of 128, 64, 32, 16 that fits D.
        score_input: `raw` or `rms`.
        seed: Seed of the scorer `random`.
        outlier_weight: Weight of the outlier intensity against the quantization error, in [0, 1].

    Raises:
        InputError: A setting is out of range.
        GraphError: When called: the graph lacks what the scorer needs. The model is unchanged then, except
            for shapes that were inferred.
    """

    def __init__(
        self,
        at: str = "image_features",
        semantic: Scorer = "cls",
        alpha: float = PAPER_ALPHA,
        group_size: int | None = None,
        score_input: ScoreInput = "raw",
        seed: int = 0,
        outlier_weight: float = PAPER_OUTLIER_WEIGHT,
    ) -> None:
        scorers.check_scorer(semantic)
        # A group size divides itself: this checks the other settings before any graph is there.
        check_score_settings(
            group_size or 1, 1 if group_size is None else group_size, alpha, score_input, outlier_weight
        )
        if seed < 0:
            raise InputError(f"seed is {seed}; it must not be negative")
        self.at = at
        self.semantic = semantic
        self.alpha = alpha
        self.group_size = group_size
        self.score_input = score_input
        self.seed = seed
        self.outlier_weight = outlier_weight

    def requires(self, model: ir.Model) -> None:
        """Checks the opset, and that the features are there and were not scored yet."""
        require_opset(model, MINIMUM_OPSET)
        require_features(model, self.at)
        require_free_name(model, SCORE)
        if self.semantic == "text":
            check_relevance(model)

    def call(self, model: ir.Model) -> RewriteResult:
        """Adds the nodes and the function."""
        features = find_value(model, self.at)
        plan = with_shapes(model, lambda: self._plan(model, features))
        opset = model.graph.opset_imports[""]
        add_function(model, hybrid_token_score(plan.width, opset, self.score_input))
        if self.semantic == "norm":
            add_function(model, token_norm(plan.width, opset))
        if self.semantic == "text":
            insert_behind(model.graph, features, self._score(features, take_relevance(model), plan))
            # The question may be read behind the features.
            model.graph.sort()
            return RewriteResult(model, modified=True, matched=1)
        builder = NodeBuilder("/prune/semantic")
        relevance = self._relevance(builder, features, plan)
        if plan.site is not None and relevance_ports(model) is not None:
            # Ahead of the nodes that make tokens of patches, which stand behind the attention once sorted.
            insert_behind(model.graph, plan.site.node.outputs[0], builder.nodes)
            relevance = connect_relevance(model, relevance)
            insert_behind(model.graph, features, self._score(features, relevance, plan))
            model.graph.sort()
        else:
            drop_relevance(model)
            insert_behind(model.graph, features, [*builder.nodes, *self._score(features, relevance, plan)])
        return RewriteResult(model, modified=True, matched=1)

    def ensures(self, model: ir.Model) -> None:
        """Checks that the score is there."""
        find_value(model, SCORE)

    def _plan(self, model: ir.Model, features: ir.Value) -> _Plan:
        tokens, width = token_grid(features)
        group_size = largest_group_size([width]) if self.group_size is None else self.group_size
        check_score_settings(width, group_size, self.alpha, self.score_input)
        if self.semantic not in scorers.ATTENTION_SCORERS:
            return _Plan(tokens, width, group_size, None, _batch(features), 0)
        site, ports = attention_upstream(model.graph, features), relevance_ports(model)
        images, patches = (_batch(features), tokens) if ports is None else patch_grid(ports[0])
        prefix = scorers.prefix_tokens(site, self.at if ports is None else PATCH_RELEVANCE, patches, self.semantic)
        return _Plan(tokens, width, group_size, site, images, prefix)

    def _relevance(self, builder: NodeBuilder, features: ir.Value, plan: _Plan) -> ir.Value:
        """Adds the semantic scorer; the relevance of the features' tokens, or of the patches they are made of."""
        if plan.site is not None:
            return scorers.attention_relevance(builder, plan.site, plan.images, plan.prefix, self.semantic)
        if self.semantic == "norm":
            return scorers.norm(builder, features, plan.images, plan.tokens)
        return scorers.random(builder, features, plan.images, plan.tokens, self.seed)

    def _score(self, features: ir.Value, relevance: ir.Value, plan: _Plan) -> list[ir.Node]:
        builder = NodeBuilder("/prune/score")
        builder.op(
            HYBRID_TOKEN_SCORE,
            HYBRID_TOKEN_SCORE,
            [features, relevance],
            ir.DataType.FLOAT,
            [_batch(features), plan.tokens],
            {
                "group_size": plan.group_size,
                "alpha": float(self.alpha),
                "outlier_weight": float(self.outlier_weight),
                "score_input": self.score_input,
                "plugin_namespace": PLUGIN_NAMESPACE,
                "plugin_version": PLUGIN_VERSION,
                "aot": 1,
            },
            domain=DOMAIN,
        )
        return builder.nodes


def set_score_weights(model: ir.Model, alpha: float, outlier_weight: float) -> None:
    """Gives the hybrid score of a graph, in place, other weights.

    Args:
        model: A graph that `InsertHybridScore` has changed.
        alpha: Weight of the semantic relevance, in [0, 1].
        outlier_weight: Weight of the outlier intensity, in [0, 1].

    Raises:
        InputError: A weight is out of range.
        GraphError: The graph has no hybrid score.
    """
    check_score_settings(1, 1, alpha, "raw", outlier_weight)
    node = find_value(model, SCORE).producer()
    if node is None:
        raise GraphError(f"nothing computes {SCORE!r}; run InsertHybridScore first")
    for name, weight in (("alpha", alpha), ("outlier_weight", outlier_weight)):
        node.attributes[name] = ir.AttrFloat32(name, float(weight))


def _batch(features: ir.Value) -> Dim:
    if features.shape is None:
        raise GraphError(f"{features.name!r} has no known shape")
    return features.shape[0]
