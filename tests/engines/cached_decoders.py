"""Runs one decoder with a cache that grows, on the canonical graph, and with one that has its memory from the start."""

from __future__ import annotations

import dataclasses
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
from qavp_export.engines.sequences import cache_names
from qavp_export.engines.tensorrt.lowering.capabilities import TENSORRT_10_13, TENSORRT_RTX
from qavp_export.families import Plan
from qavp_export.manifest import DecoderSpec
from qavp_export.passes import FoldWeightTransposes
from tests.engines.lowered import AS_IT_IS, Array, open_canonical, open_lowered, run, write_canonical
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

    def coded(self) -> CachedDecoder:
        """Opens the lowered graphs with a cache of 8-bit codes."""
        prefill = self._open("prefill", self.lowering.body("prefill", "integer", CPU))
        decode = self._open("decode.int8", self.lowering.body("decode", "packed", CPU.with_codes()))
        return dataclasses.replace(
            self.cached(one_graph=False),
            prefill=prefill[0],
            decode=decode[0],
            prefill_inputs=prefill[1],
            decode_inputs=decode[1],
            coded=True,
        )

    def _open(self, name: str, lowered: Lowered) -> tuple[Graph, frozenset[str]]:
        check_order(lowered.model.graph)
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


def check_order(graph: ir.Graph) -> None:
    """Fails where a node reads what a later one makes, as ONNX forbids and ONNX Runtime lets pass."""
    made: set[ir.Value] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None and value.producer() is not None]
        assert made.issuperset(read), f"{node.name} comes too early"
        made.update(node.outputs)


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
    check_codes(decoders, prompt)
    check_tensorrt(decoders, plan, prompt)
    return decoders


def check_codes(decoders: Decoders, prompt: Prompt) -> None:
    """Compares single tokens over a cache of 8-bit codes with the canonical graph over what the codes stand for.

    The canonical graph is cut where it joins the cache and what is new: it reads a whole cache that it is given, and
    shows the new keys and values before they are rounded.
    """
    session, whole = CachedSession(decoders.coded(), 0), WholeCache(decoders)
    logits = decoders.prefill(session, prompt)
    check_close(logits, decoders.prefill(GrowingSession(decoders.growing), prompt))
    mask = prompt.mask
    for number, (actual, token) in enumerate(zip(decoders.answer(session, prompt), prompt.answer.T, strict=True)):
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        expected, new = whole.run(session, token[:, None], mask, prompt.positions[:, -1:] + 1 + number)
        check_close(actual, expected)
        for codes, scales, exact in zip(session._cache, session._scales, new, strict=True):
            rows = np.arange(len(mask))
            written = codes.numpy()[rows, :, mask.sum(axis=1) - 1].astype(np.float64)
            wanted = np.clip(exact / scales.numpy().reshape(written.shape), -128, 127)
            # Codes next to a tie turn on float32 rounding.
            np.testing.assert_allclose(written, wanted, rtol=0, atol=0.5 + 1e-3)


class WholeCache:
    """The canonical graph behind the point where it joins the cache and what is new."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        path = decoders.bundle / "decoder" / "model.onnx"
        model = ir.load(path)
        graph = model.graph
        self._past, _ = cache_names(decoders.spec.num_layers)
        for past in [value for value in graph.inputs if value.name in self._past]:
            (joined,) = [node for node in past.consumers() if node.op_type == "Concat"]
            whole = ir.Value(name=f"whole.{past.name}", shape=past.shape, type=past.type)
            graph.inputs.append(whole)
            index = [value is joined.outputs[0] for value in graph.outputs].index(True)
            new = joined.inputs[1]
            assert new is not None
            graph.outputs[index] = new
            ir.convenience.replace_all_uses_with(joined.outputs[0], whole)
            new.name = f"new.{past.name}"
        # External weights are named beside it.
        cut = path.with_name("cut.onnx")
        ir.save(model, cut)
        self._typed = "token_type_ids" in [value.name for value in graph.inputs]
        names = [[str(value.name) for value in values] for values in (graph.inputs, graph.outputs)]
        self._graph = Graph("decoder", cut, AS_IT_IS, *names)

    def run(self, session: CachedSession, token: Array, mask: Array, positions: Array) -> tuple[Array, list[Array]]:
        """Runs a token that a session has just run.

        Returns:
            Logits `[B,V]`, and what is new of each tensor of the cache `[B,KV,d]`.
        """
        inputs = {"attention_mask": mask, "position_ids": positions, "inputs_embeds": self._decoders.table[token]}
        if self._typed:
            inputs["token_type_ids"] = np.zeros_like(token)
        for name, codes, scales in zip(self._past, session._cache, session._scales, strict=True):
            rows, heads, _, channels = codes.shape()
            values = codes.numpy() * scales.numpy().reshape(rows, heads, 1, channels)
            whole = np.zeros((rows, heads, mask.shape[1], channels), np.float32)
            for row, length in enumerate(mask.sum(axis=1)):
                whole[row, :, mask.shape[1] - length :] = values[row, :, :length]
            inputs |= {name: whole[:, :, :-1], f"whole.{name}": whole}
        outputs = run(self._graph, inputs)
        return outputs["logits"][:, -1], [outputs[f"new.{name}"][:, :, 0] for name in self._past]


def check_tensorrt(decoders: Decoders, plan: Plan, prompt: Prompt) -> None:
    """Compares what TensorRT builds with the canonical graph, in float32 and in the 16-bit floats that it asks for.

    The oldest release, for which operators are written out, in 16 bits.
    """
    longest = prompt.ids.shape[1]
    expected, expected_steps = decoders.canonical_answer(prompt)
    real = prompt.mask == 1
    releases = (
        (TENSORRT_RTX, False, check_close),
        (TENSORRT_RTX, True, check_half),
        (TENSORRT_10_13, True, check_half),
    )
    for capabilities, half, check in releases:
        stored = ir.load(decoders.bundle / "decoder" / "model.onnx")
        trt = TrtDecoder.of(stored, plan, capacity=64, half=half, capabilities=capabilities)
        logits = trt.prefill(decoders.table[prompt.ids], prompt, longest)
        check(logits[real], expected[real])
        for actual, wanted in zip(trt.answer(decoders.table, prompt.answer), expected_steps, strict=True):
            check(actual, wanted)


def check_half(actual: Array, expected: Array) -> None:
    """Compares logits behind attention in 16-bit floats, whose last bit is 5e-4 of a value: 3e-3 was seen."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=HALF * np.abs(expected).max())
