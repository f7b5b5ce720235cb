"""Lowers a decoder: to a graph that runs prompts, one that runs single tokens, and the head behind both."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qavp_export.engines.lowering.attention import AttentionSite, find_attention
from qavp_export.engines.lowering.linear import quantized_linears
from qavp_export.engines.lowering.masks import MaskKind, classify_masks
from qavp_export.engines.lowering.split import HIDDEN, gather_rows, remove_unused, split_head
from qavp_export.engines.ort.lowering.cache import Phase, lower_attention
from qavp_export.engines.ort.lowering.capabilities import Capabilities
from qavp_export.engines.ort.lowering.half import widen_halves
from qavp_export.engines.ort.lowering.linear import Products, lower_linears
from qavp_export.engines.ort.lowering.weights import Lowered, WeightPlans
from qavp_export.errors import GraphError


class DecoderLowering:
    """Lowers one canonical decoder in several ways.

    Args:
        model: The decoder; it is not changed.
        context_length: Most tokens of a sequence.

    Attributes:
        refused: Why attention stays as it is, with a cache that is copied as it grows; None if it is lowered.
    """

    def __init__(self, model: ir.Model, context_length: int) -> None:
        self._body, self._head = split_head(model)
        self._kinds: dict[str, MaskKind] = {}
        self.refused: str | None = None
        try:
            sites = find_attention(self._body.graph)
            masks = list({str(site.mask.name): site.mask for site in sites}.values())
            self._kinds = classify_masks(self._body, masks, context_length)
        except GraphError as error:
            self.refused = str(error)

    @property
    def runs_both(self) -> bool:
        """Whether one graph can run prompts and single tokens."""
        return all(kind.causal for kind in self._kinds.values())

    @property
    def differs(self) -> bool:
        """Whether a graph for prompts computes with other weights than one for single tokens."""
        layers = quantized_linears(self._body.graph)
        return any(layer.is_integer_product and layer.is_packable_to_4_bits for layer in layers)

    def body(self, phase: Phase, products: Products, capabilities: Capabilities) -> Lowered:
        """Returns the decoder without its head; its last layers run for the positions in `logit_positions` only."""
        model = self._body.clone()
        plans = WeightPlans("decoder")
        if self.refused is None:
            sites: list[AttentionSite] = find_attention(model.graph)
            if phase != "decode":
                hidden = next(value for value in model.graph.outputs if value.name == HIDDEN)
                gather_rows(model.graph, sites[-1], hidden)
            lower_attention(model.graph, sites, self._kinds, phase, capabilities)
        precision = lower_linears(model.graph, products, capabilities, plans)
        return _finished(model, plans, precision)

    def head(self, capabilities: Capabilities) -> Lowered:
        """Returns the head: `hidden_states [B,R,D]` -> `logits [B,R,V]`."""
        model = self._head.clone()
        plans = WeightPlans("decoder")
        precision = lower_linears(model.graph, "packed", capabilities, plans)
        return _finished(model, plans, precision)


def _finished(model: ir.Model, plans: WeightPlans, precision: Mapping[str, str]) -> Lowered:
    remove_unused(model)
    widen_halves(model.graph, plans)
    remove_unused(model)
    return Lowered(model, plans.finish(model.graph), precision)
