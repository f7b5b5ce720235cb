"""Runs one decoder with a cache that grows, on the canonical graph, and with one that has its memory from the start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qavp_export.engines import DecoderSession
from qavp_export.engines.ort.cached import CachedDecoder, CachedSession
from qavp_export.engines.ort.encoders import OrtEmbedding
from qavp_export.engines.ort.growing import GrowingDecoder, GrowingSession
from qavp_export.engines.ort.lowering.capabilities import CPU
from qavp_export.engines.ort.lowering.decoder import DecoderLowering
from qavp_export.engines.ort.lowering.weights import Lowered
from qavp_export.engines.ort.session import Graph
from qavp_export.families import Plan
from qavp_export.manifest import DecoderSpec
from qavp_export.passes import FoldWeightTransposes
from tests.engines.lowered import Array, open_canonical, open_lowered, write_canonical
from tests.engines.prompts import Prompt
from tests.engines.trt_decoder import TrtDecoder
from tests.families.harness import ROUNDING

# Of the largest logit.
HALF = 1e-2


class _Table:
    """Embeds text by a table, as a bundle's embedding does."""

    def __init__(self, table: Array) -> None:
        self._table = table
        # ONNX Runtime owns what a graph returns; here someone else has to keep it.
        self._kept: list[Array] = []

    def embed_text(self, input_ids: Array) -> ort.OrtValue:
        self._kept.append(self._table[input_ids])
        return ort.OrtValue.ortvalue_from_numpy(self._kept[-1])


@dataclass(frozen=True)
class Decoders:
    """One decoder, opened in every way.

    Attributes:
        lowering: What lowered it.
        table: Embeddings of its tokens.
        growing: The canonical graph.
        bundle: Where its weights lie.
        spec: Its sizes.
    """

    lowering: DecoderLowering
    table: Array
    growing: GrowingDecoder
    bundle: Path
    spec: DecoderSpec

    @classmethod
    def of(cls, model: ir.Model, plan: Plan, bundle: Path) -> Decoders:
        """Writes and lowers a traced decoder with float weights."""
        model = model.clone()
        FoldWeightTransposes()(model)
        # Folded transposes are lazy, and so is what is not quantized in a bundle.
        canonical = write_canonical(model, bundle)
        sizes = (plan.num_layers, plan.num_key_value_heads, plan.head_dim, plan.hidden_size, plan.vocab_size)
        spec = DecoderSpec(*sizes, plan.context_length, [2], 0)
        table = np.random.default_rng(8).standard_normal((plan.vocab_size, plan.hidden_size)).astype(np.float32)
        graph = open_canonical(bundle)
        typed = "token_type_ids" in [value.name for value in canonical.graph.inputs]
        growing = GrowingDecoder(cast(OrtEmbedding, _Table(table)), graph, graph, None, spec, typed)
        return cls(DecoderLowering(canonical, plan.context_length), table, growing, bundle, spec)

    def cached(self, *, one_graph: bool) -> CachedDecoder:
        """Opens the lowered graphs."""
        head, _ = self._open("head", self.lowering.head(CPU))
        if one_graph:
            both = self._open("any", self.lowering.body("any", "packed", CPU))
            prefill, decode = both, both
        else:
            prefill = self._open("prefill", self.lowering.body("prefill", "integer", CPU))
            decode = self._open("decode", self.lowering.body("decode", "packed", CPU))
        return CachedDecoder(self.growing.embedding, prefill[0], decode[0], head, prefill[1], decode[1], self.spec)

    def _open(self, name: str, lowered: Lowered) -> tuple[Graph, frozenset[str]]:
        graph = open_lowered(lowered, self.bundle, name)
        return graph, frozenset(str(value.name) for value in lowered.model.graph.inputs)

    def prefill(self, session: DecoderSession, prompt: Prompt, keep: int = 1) -> Array:
        """Runs a prompt."""
        embeds = self.table[prompt.ids]
        return session.prefill(embeds, prompt.mask, prompt.positions, prompt.types, logits_to_keep=keep)

    def answer(self, session: DecoderSession, prompt: Prompt) -> Iterator[Array]:
        """Gives an answer token by token; yields the logits behind each `[B,V]`."""
        mask, positions = prompt.mask, prompt.positions[:, -1:]
        for token in prompt.answer.T:
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
            positions = positions + 1
            logits = session.decode(token[:, None], mask, positions)
            assert logits.shape[:2] == (len(mask), 1)
            yield logits[:, 0]

    def canonical_answer(self, prompt: Prompt) -> tuple[Array, list[Array]]:
        """Returns the canonical logits of a prompt, and behind each token of its answer."""
        session = GrowingSession(self.growing)
        return self.prefill(session, prompt, keep=0), list(self.answer(session, prompt))

    def check(self, cached: CachedDecoder, prompt: Prompt, capacity: int = 0) -> None:
        """Fails where logits differ by more than float32 sums in another order make of them."""
        expected, expected_steps = self.canonical_answer(prompt)
        for keep in (0, 5, 1):
            session = CachedSession(cached, capacity)
            logits = self.prefill(session, prompt, keep)
            assert logits.shape == (len(prompt.ids), keep or prompt.ids.shape[1], self.spec.vocab_size)
            real = prompt.mask[:, -keep:] == 1
            check_close(logits[real], expected[:, -keep:][real])
        for actual, wanted in zip(self.answer(session, prompt), expected_steps, strict=True):
            check_close(actual, wanted)


def check_close(actual: Array, expected: Array) -> None:
    """Compares logits."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def check_lowered(model: ir.Model, plan: Plan, bundle: Path, *, one_graph: bool, vision: slice | None = None) -> Any:
    """Lowers a decoder and compares it with itself, beyond windows and original lengths of 32.

    Args:
        model: The traced decoder.
        plan: Its sizes.
        bundle: An empty folder.
        one_graph: Whether one graph can run prompts and single tokens.
        vision: Columns of the prompt that are vision tokens.
    """
    decoders = Decoders.of(model, plan, bundle)
    assert decoders.lowering.refused is None
    assert decoders.lowering.runs_both == one_graph
    prompt = Prompt.random(plan.vocab_size, (38, 31), 14, vision=vision)
    decoders.check(decoders.cached(one_graph=False), prompt)
    if one_graph:
        decoders.check(decoders.cached(one_graph=True), prompt, capacity=50)
    check_tensorrt(decoders, plan, prompt)
    return decoders


def check_tensorrt(decoders: Decoders, plan: Plan, prompt: Prompt) -> None:
    """Compares what TensorRT builds with the canonical graph, in float32 and in the 16-bit floats that it asks for."""
    longest = prompt.ids.shape[1]
    expected, expected_steps = decoders.canonical_answer(prompt)
    real = prompt.mask == 1
    for half, check in ((False, check_close), (True, check_half)):
        trt = TrtDecoder.of(ir.load(decoders.bundle / "decoder" / "model.onnx"), plan, capacity=64, half=half)
        logits = trt.prefill(decoders.table[prompt.ids], prompt, longest)
        check(logits[real], expected[real])
        for actual, wanted in zip(trt.answer(decoders.table, prompt.answer), expected_steps, strict=True):
            check(actual, wanted)


def check_half(actual: Array, expected: Array) -> None:
    """Compares logits behind attention in 16-bit floats, whose last bit is 5e-4 of a value: 3e-3 was seen."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=HALF * np.abs(expected).max())
