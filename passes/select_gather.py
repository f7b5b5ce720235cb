"""Keeps k of N image tokens: the best-scored, or good and diverse ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import get_args

import onnx_ir as ir

from qavp_export.errors import GraphError, InputError
from qavp_export.numerics.select import Select, tokens_to_keep
from qavp_export.passes._builder import Attribute, Dim, NodeBuilder
from qavp_export.passes._infra import (
    Refusal,
    RewritePass,
    RewriteResult,
    downstream,
    find_value,
    infer_shapes,
    insert_behind,
    require_features,
    require_free_name,
    require_opset,
    token_grid,
    upstream,
    with_shapes,
)
from qavp_export.passes.functions import DOMAIN, add_function
from qavp_export.passes.hybrid_score import MINIMUM_OPSET, PLUGIN_NAMESPACE, PLUGIN_VERSION, SCORE
from qavp_export.passes.select_diverse import SELECT_DIVERSE, select_diverse

KEPT_INDICES = "kept_indices"
KEEP_TOKENS = "keep_tokens"


@dataclass(frozen=True)
class SelectPlan:
    """What `SelectGather` is going to do.

    Attributes:
        kept: Tokens per image that are kept, k: a number, or the dimension `kept`.
        width: Channels per token, D.
        uses: Nodes, and which of their inputs, that will read the kept tokens.
        dependents: All nodes behind these uses.
    """

    kept: Dim
    width: int
    uses: list[tuple[ir.Node, int]]
    dependents: list[ir.Node]


class SelectGather(RewritePass):
    """Replaces image features `[B,N,D]` by k of the tokens, `[B,k,D]`, in raster order.

    1. `topk`: `TopK` over the score, ties to the lower index, then `TopK` over the indices sorts them. `dpp` and
       `maxmin`: one node `/prune/select/SelectDiverse` of domain `qavp` chooses and sorts, a model-local function of
       standard operators; its attributes `plugin_namespace`, `plugin_version` and `aot` let TensorRT run a plugin in
       its place. Either way, this is the new graph output `kept_indices [B,k]`, INT64.
    2. `GatherND` with one batch axis copies the k rows.
    3. All that read the features read the kept ones instead, but for what the score depends on. The kept
       features take over the features' name, the full ones are renamed `<name>_unpruned` (a graph input keeps
       its name; the kept features are named `<name>_pruned` then).

    k is static: the graph states it, and N must be static too where k is a fraction of it. With `keep_input`, k comes
    with every call, as the new graph input `keep_tokens [1]`, INT64; one that exceeds N fails when the graph runs.
    k = N is valid and keeps everything. Other graph outputs of N tokens that do
    not depend on the features stay as they are, and the result lists them as refused.

    Args:
        at: Name of the image features.
        score: Name of the score, `[B,N]` FLOAT.
        keep: The fraction kept, in (0, 1]; give this, `tokens` or `keep_input`.
        tokens: The number kept, k.
        select: `topk`, `dpp` or `maxmin`.
        keep_input: Take k from the graph input `keep_tokens`.

    Raises:
        InputError: A setting is out of range.
        GraphError: When called: the graph lacks the features, the score or a known N, or what consumes the
            features is fixed to N tokens. The model is unchanged then, except for shapes that were inferred.
    """

    def __init__(
        self,
        at: str = "image_features",
        score: str = SCORE,
        keep: float | None = None,
        tokens: int | None = None,
        select: Select = "topk",
        *,
        keep_input: bool = False,
    ) -> None:
        if (keep is not None) + (tokens is not None) + keep_input != 1:
            raise InputError("give either keep or tokens or keep_input")
        if keep is not None:
            # Any number of tokens will do: this checks the fraction before any graph is there.
            tokens_to_keep(1, keep)
        if tokens is not None and tokens < 1:
            raise InputError(f"tokens is {tokens}; it must be at least 1")
        if select not in get_args(Select):
            raise InputError(f"select is {select!r}; choose one of {list(get_args(Select))}")
        self.at = at
        self.score = score
        self.keep = keep
        self.tokens = tokens
        self.select = select
        self.keep_input = keep_input

    def requires(self, model: ir.Model) -> None:
        """Checks the opset, and that features and score are there and nothing was selected yet."""
        find_value(model, self.score)
        self.check_features(model)

    def check_features(self, model: ir.Model) -> None:
        """Checks all of `requires` but the score: what can be told before it is inserted.

        Raises:
            GraphError: The graph lacks something.
        """
        require_opset(model, MINIMUM_OPSET)
        features = require_features(model, self.at)
        require_free_name(model, KEPT_INDICES)
        if self.keep_input:
            require_free_name(model, KEEP_TOKENS)
        if features.producer() is None and features in model.graph.outputs:
            raise GraphError(f"{self.at!r} is an input and an output of the graph; nothing computes it")

    def call(self, model: ir.Model) -> RewriteResult:
        """Adds the nodes and redirects the consumers."""
        features, score = find_value(model, self.at), find_value(model, self.score)
        plan = self.plan(model, upstream(score))
        refused = _unpruned_outputs(model, features, plan)
        if self.select != "topk":
            add_function(model, select_diverse(self.select, plan.width, model.graph.opset_imports[""]))
        builder = NodeBuilder("/prune/select")
        count = self._count_value(model, builder, plan.kept)
        choose = _best if self.select == "topk" else self._diverse
        indices = choose(builder, (features, score, count), [_batch(features), plan.kept])
        indices.name = KEPT_INDICES
        gathered = _gather(builder, features, indices, plan)
        insert_behind(model.graph, score, builder.nodes)
        for node, index in plan.uses:
            node.replace_input_with(index, gathered)
        outputs = model.graph.outputs
        outputs[:] = [gathered if value is features else value for value in outputs]
        outputs.append(indices)
        self._rename(features, gathered)
        _refresh_shapes(model, plan.dependents)
        # The score may stand behind other consumers of the features.
        model.graph.sort()
        return RewriteResult(model, modified=True, matched=1, refused=refused)

    def ensures(self, model: ir.Model) -> None:
        """Checks that k tokens and their indices are there."""
        kept = [value for value in model.graph.outputs if value.name == KEPT_INDICES]
        if len(kept) != 1 or kept[0].shape is None or isinstance(kept[0].shape[1], int) == self.keep_input:
            raise GraphError(f"the graph has no output {KEPT_INDICES!r} [B,k]")

    def plan(self, model: ir.Model, scoring: Collection[ir.Node] = ()) -> SelectPlan:
        """What the pass would do; the graph is not changed, except for shapes that are inferred.

        Args:
            model: A model that holds the features.
            scoring: The nodes that the score depends on; they keep reading all tokens.

        Returns:
            The plan.

        Raises:
            InputError: k exceeds N.
            GraphError: N is not known, or a consumer is fixed to N tokens.
        """
        features = find_value(model, self.at)
        tokens, width = with_shapes(model, lambda: token_grid(features))
        uses = [(use.node, use.idx) for use in features.uses() if use.node not in scoring]
        dependents = downstream(node for node, _ in uses)
        _require_flexible(dependents, tokens, self.at)
        kept = ir.SymbolicDim("kept") if self.keep_input else self._count(tokens)
        return SelectPlan(kept, width, uses, dependents)

    def _count(self, available: Dim) -> int:
        """Returns k, checked against N tokens where N is a number."""
        if self.tokens is None:
            if not isinstance(available, int):
                raise GraphError(
                    f"{self.at!r} has a varying number of tokens ({available}), of which no fraction can be stated; "
                    "use keep_input or tokens"
                )
            return tokens_to_keep(available, self.keep or 0.0)
        if isinstance(available, int) and self.tokens > available:
            raise InputError(f"tokens is {self.tokens}, but {self.at!r} has {available} tokens per image")
        return self.tokens

    def _count_value(self, model: ir.Model, builder: NodeBuilder, kept: Dim) -> ir.Value:
        """Returns k as TopK reads it."""
        if isinstance(kept, int):
            return builder.ints("k", [kept])
        given = ir.Value(name=KEEP_TOKENS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        model.graph.inputs.append(given)
        return given

    def _diverse(self, builder: NodeBuilder, inputs: Sequence[ir.Value], shape: Sequence[Dim]) -> ir.Value:
        """The indices `[B,k]` that the rule chooses, ascending; inputs are features, score and k."""
        attributes: dict[str, Attribute] = {
            "select": self.select,
            "plugin_namespace": PLUGIN_NAMESPACE,
            "plugin_version": PLUGIN_VERSION,
            "aot": 1,
        }
        name, int64 = SELECT_DIVERSE, ir.DataType.INT64
        indices = builder.op(name, name, inputs, int64, shape, attributes, domain=DOMAIN, outputs=2)
        order = builder.nodes[-1].outputs[1]
        order.dtype, order.shape = int64, ir.Shape(shape)
        return indices

    def _rename(self, features: ir.Value, gathered: ir.Value) -> None:
        if features.producer() is None:
            gathered.name = f"{self.at}_pruned"
        else:
            features.name = f"{self.at}_unpruned"
            gathered.name = self.at


def _batch(features: ir.Value) -> Dim:
    if features.shape is None:
        raise GraphError(f"{features.name!r} has no known shape")
    return features.shape[0]


def _best(builder: NodeBuilder, inputs: Sequence[ir.Value], shape: Sequence[Dim]) -> ir.Value:
    """The indices `[B,k]` of the highest scores, ascending; inputs are features, score and k."""
    _, score, count = inputs
    int64, best_first, ascending = ir.DataType.INT64, {"axis": -1, "largest": 1}, {"axis": -1, "largest": 0}
    best = builder.op("TopK", "TopK", [score, count], int64, shape, best_first | {"sorted": 1}, outputs=2, used=1)
    return builder.op("Sort", "TopK", [best, count], int64, shape, ascending | {"sorted": 1}, outputs=2)


def _gather(builder: NodeBuilder, features: ir.Value, indices: ir.Value, plan: SelectPlan) -> ir.Value:
    int64, shape, dtype = ir.DataType.INT64, [_batch(features), plan.kept], features.dtype or ir.DataType.FLOAT
    last = builder.ints("Unsqueeze/axes", [-1])
    rows = builder.op("Unsqueeze", "Unsqueeze", [indices, last], int64, [*shape, 1])
    return builder.op("GatherND", "GatherND", [features, rows], dtype, [*shape, plan.width], {"batch_dims": 1})


def _unpruned_outputs(model: ir.Model, features: ir.Value, plan: SelectPlan) -> list[Refusal]:
    """Graph outputs that have as many tokens as the features and stay unpruned."""
    refused, (tokens, _) = [], token_grid(features)
    for value in model.graph.outputs:
        node = value.producer()
        if value is features or value.shape is None or value.shape.rank() != 3 or value.shape[1] != tokens:
            continue
        if node is not None and node not in plan.dependents:
            reason = f"output {value.name!r} keeps its {tokens} tokens: it does not depend on {features.name!r}"
            refused.append(Refusal(node.name or "", reason))
    return refused


def _require_flexible(nodes: list[ir.Node], tokens: Dim, at: str) -> None:
    """Refuse consumers that spell the number of tokens out: they would mix tokens up, or fail at run time."""
    if not isinstance(tokens, int):
        return
    for node in nodes:
        if node.op_type not in ("Reshape", "Expand") or node.inputs[1] is None:
            continue
        target = ir.convenience.get_const_tensor(node.inputs[1])
        if target is not None and tokens in (sizes := target.numpy().tolist()):
            raise GraphError(
                f"{node.op_type} {node.name!r} behind {at!r} is fixed to {sizes}, {tokens} tokens included; "
                "prune at a value behind it"
            )


def _refresh_shapes(model: ir.Model, nodes: list[ir.Node]) -> None:
    """Shapes behind the features told of N tokens: forget and infer them."""
    if not nodes:
        return
    for node in nodes:
        for value in node.outputs:
            value.shape = None
    infer_shapes(model)
