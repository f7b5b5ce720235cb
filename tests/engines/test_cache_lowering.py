"""Lowered attention on a preallocated cache; tests/families, where decoders are traced, compare every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import pytest

from qavp_export.engines import sequences
from qavp_export.engines.lowering.attention import find_attention
from qavp_export.engines.lowering.masks import MaskKind, classify_masks
from qavp_export.engines.ort.cached import CachedDecoder, CachedSession
from qavp_export.engines.ort.growing import GrowingDecoder, GrowingSession
from qavp_export.engines.ort.lowering.cache import lower_attention
from qavp_export.engines.ort.lowering.capabilities import CPU
from qavp_export.engines.ort.plan import LEAST_PROMPT
from qavp_export.errors import GraphError, InputError
from tests.engines.cached_decoders import Decoders, check_close
from tests.engines.lowered import nodes_of, open_lowered
from tests.engines.prompts import Prompt
from tests.models.tiny import TinySpec
from tests.passes.decoders import hand_made, llama_decoder, trace_decoder


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    """A Llama decoder: two layers, six heads of which three share keys and values."""
    return Decoders.of(*llama_decoder(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["two graphs", "one graph"])
def opened(request: pytest.FixtureRequest, decoders: Decoders) -> CachedDecoder:
    """The lowered graphs."""
    return decoders.cached(one_graph=request.param == "one graph")


@pytest.fixture
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the cache grow in steps of 8 tokens."""
    monkeypatch.setattr(sequences, "_STEP", 8)


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("capacity", [0, 7, 8, 9, 17, 40])
def test_a_cache_that_grows_loses_nothing(decoders: Decoders, opened: CachedDecoder, capacity: int) -> None:
    # 7 tokens and 35 more: without capacity it grows to 8, 16, 32 and 64.
    prompt = Prompt.random(decoders.spec.vocab_size, (7, 3), 35)
    expected, steps = decoders.canonical_answer(prompt)
    session = CachedSession(opened, capacity)
    check_close(decoders.prefill(session, prompt), expected[:, -1:])
    capacities = set()
    for actual, wanted in zip(decoders.answer(session, prompt), steps, strict=True):
        check_close(actual, wanted)
        capacities.add(_capacity(session))
    assert max(capacities) < 2 * 42 + 8
    assert len(capacities) == {0: 4, 7: 4, 8: 4, 9: 3, 17: 2, 40: 2}[capacity]


def _capacity(session: CachedSession) -> int:
    size: int = session._cache[0].shape()[2]
    return size


def _addresses(session: CachedSession) -> list[int]:
    return [tensor.data_ptr() for tensor in session._cache]


def test_a_step_writes_into_the_memory_that_it_reads(decoders: Decoders, opened: CachedDecoder) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (5, 3), 6)
    session = CachedSession(opened, capacity=20)
    decoders.prefill(session, prompt)
    addresses, before = _addresses(session), [tensor.numpy().copy() for tensor in session._cache]
    assert len(set(addresses)) == 2 * decoders.spec.num_layers
    for number, _ in enumerate(decoders.answer(session, prompt), start=1):
        assert _addresses(session) == addresses
        for old, tensor in zip(before, session._cache, strict=True):
            new = tensor.numpy()
            for row, length in enumerate((5, 3)):
                # What was there stays; what came is behind it.
                np.testing.assert_array_equal(new[row, :, :length], old[row, :, :length])
                assert new[row, :, length : length + number].any(axis=-1).all()
            # Behind the shorter prompt is its padding, until it is written over.
            assert not new[:, :, 5 + number :].any()


@pytest.mark.usefixtures("_small_steps")
def test_reordered_rows_are_what_beam_search_asks_for(decoders: Decoders, opened: CachedDecoder) -> None:
    # Rows are repeated, dropped and turned around; there are more and fewer of them; the cache grows in between.
    prompt = Prompt.random(decoders.spec.vocab_size, (7, 3, 5), 0)
    growing, session = GrowingSession(decoders.growing), CachedSession(opened, 0)
    check_close(decoders.prefill(session, prompt), decoders.prefill(growing, prompt))
    mask, positions = prompt.mask, prompt.positions[:, -1:]
    rng = np.random.default_rng(2)
    for rows in ([2, 0, 0, 1], [3, 3, 1, 2], [1, 0], [0, 1], [1, 1, 1, 0, 0], [4, 0, 2, 2, 1]):
        growing.reorder(np.array(rows))
        session.reorder(np.array(rows))
        mask, positions = mask[rows], positions[rows]
        for _ in range(2):
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
            positions = positions + 1
            step = rng.integers(0, decoders.spec.vocab_size, (len(rows), 1)), mask, positions
            check_close(session.decode(*step), growing.decode(*step))


def test_a_session_starts_anew_with_every_prompt(decoders: Decoders, opened: CachedDecoder) -> None:
    session = CachedSession(opened, 0)
    # Some have fewer tokens than attention has tiles, some no whole number of tokens in each.
    for lengths in ((9, 4), (3,), (2, 6, 6), (1,), (2, 1), (4, 1), (8,)):
        prompt = Prompt.random(decoders.spec.vocab_size, lengths, 3)
        expected, steps = decoders.canonical_answer(prompt)
        check_close(decoders.prefill(session, prompt), expected[:, -1:])
        for actual, wanted in zip(decoders.answer(session, prompt), steps, strict=True):
            check_close(actual, wanted)


@pytest.mark.parametrize("keep", [1, 4, 5, 9])
def test_no_more_logits_than_there_are_tokens(decoders: Decoders, opened: CachedDecoder, keep: int) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (5,), 0)
    expected = decoders.prefill(GrowingSession(decoders.growing), prompt, keep)
    check_close(decoders.prefill(CachedSession(opened, 0), prompt, keep), expected)


def test_arrays_of_any_layout_and_type(decoders: Decoders, opened: CachedDecoder) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (6, 4), 3)
    session = CachedSession(opened, 20)
    embeds = np.asfortranarray(decoders.table[prompt.ids].astype(np.float64))
    mask, positions = (np.asfortranarray(array.astype(np.int32)) for array in (prompt.mask, prompt.positions))
    logits = [session.prefill(embeds, mask, positions, logits_to_keep=1)[:, 0]]  # type: ignore[arg-type]
    logits += decoders.answer(session, prompt)
    expected, steps = decoders.canonical_answer(prompt)
    for actual, wanted in zip(logits, [expected[:, -1], *steps], strict=True):
        check_close(actual, wanted)


@pytest.mark.parametrize(
    "mask", [[[1, 1, 0]], [[1, 0, 1]], [[0, 1, 0]], [[0, 0, 0]], [[1, 1, 1], [1, 0, 1]], [[0, 1, 1], [0, 0, 0]]]
)
def test_padding_elsewhere_than_in_front_is_refused(decoders: Decoders, opened: CachedDecoder, mask: list[int]) -> None:
    ids = np.zeros(np.shape(mask), np.int64)
    with pytest.raises(InputError, match="pad on the left only"):
        decoders.prefill(CachedSession(opened, 0), Prompt(ids, np.array(mask), ids[:, :0]))


def test_the_last_layer_finishes_only_what_is_asked_for(decoders: Decoders) -> None:
    graph = decoders.lowering.body("prefill", "integer", CPU).model.graph
    gathered = [node for node in graph if node.op_type == "GatherND"]
    # Attention's output and the residual stream.
    assert len(gathered) == 2
    behind: set[ir.Node] = set()
    for node in graph:
        if node in gathered or any(value is not None and value.producer() in behind for value in node.inputs):
            behind.add(node)
    scopes = [str(node.inputs[1].name) for node in graph if node in behind and node.op_type == "MatMul"]
    # All of the last layer behind attention: of q, k and v nothing.
    assert len(scopes) == 4
    assert all(f".1.{part}" in scope for part, scope in zip(("self_attn.o", "mlp", "mlp", "mlp"), scopes, strict=True))


def test_lowered_graphs_have_no_concatenated_cache(decoders: Decoders) -> None:
    operators = (("prefill", "Attention", LEAST_PROMPT), ("any", "GroupQueryAttention", 1), ("decode", "Softmax", 1))
    for phase, operator, count in operators:
        model = decoders.lowering.body(phase, "packed", CPU).model  # type: ignore[arg-type]
        assert len(nodes_of(model, operator)) == count * decoders.spec.num_layers
        assert operator == "Attention" or not nodes_of(model, "Attention")
        for name in ("past_key_values.0.key", "past_key_values.1.value"):
            (past,) = [value for value in model.graph.inputs if value.name == name]
            readers = {node.op_type for node in past.consumers()}
            assert "Concat" not in readers
            assert readers <= {"GroupQueryAttention", "TensorScatter", "Shape"}


def test_prompts_of_heads_that_share_no_keys_are_not_cut_into_tiles(tmp_path: Path) -> None:
    decoders = Decoders.of(*trace_decoder(TinySpec(kv_heads=6)), tmp_path)
    model = decoders.lowering.body("prefill", "integer", CPU).model
    assert len(nodes_of(model, "GroupQueryAttention")) == decoders.spec.num_layers
    assert not nodes_of(model, "Attention")


def _damaged(change: Callable[[ir.Graph], None]) -> ir.Model:
    model, _ = llama_decoder()
    change(model.graph)
    return model


def _scale_keys(graph: ir.Graph) -> None:
    """Puts a node between keys and attention that says nothing, and is not known."""
    node = nodes_of(ir.Model(graph, ir_version=11), "Attention")[0]
    keys = cast(ir.Value, node.inputs[1])
    absent = ir.node("Relu", [ir.node("Neg", [keys]).outputs[0]])
    # max(k, 0) - max(-k, 0) = k
    minuend = ir.node("Relu", [keys])
    difference = ir.node("Sub", [minuend.outputs[0], absent.outputs[0]])
    nodes = [cast(ir.Value, absent.inputs[0]).producer(), absent, minuend, difference]
    for number, made in enumerate(nodes):
        made.outputs[0].name, made.outputs[0].dtype, made.outputs[0].shape = f"made_{number}", keys.dtype, keys.shape
    graph.insert_before(node, nodes)
    node.replace_input_with(1, difference.outputs[0])


def test_attention_of_an_unknown_form_keeps_the_cache_that_grows(tmp_path: Path) -> None:
    model, plan = llama_decoder()
    _scale_keys(model.graph)
    decoders = Decoders.of(model, plan, tmp_path)
    assert decoders.lowering.refused is not None
    assert "does not come from a key/value cache" in decoders.lowering.refused
    body = open_lowered(decoders.lowering.body("any", "packed", CPU), tmp_path, "any")
    head = open_lowered(decoders.lowering.head(CPU), tmp_path, "head")
    session = GrowingSession(GrowingDecoder(decoders.growing.embedding, body, body, head, decoders.spec, False))
    prompt = Prompt.random(plan.vocab_size, (9, 4), 5)
    expected, steps = decoders.canonical_answer(prompt)
    # The change changes nothing.
    plain = Decoders.of(*llama_decoder(), tmp_path / "plain")
    check_close(plain.canonical_answer(prompt)[0], expected)
    for keep in (1, 3):
        check_close(decoders.prefill(session, prompt, keep), expected[:, -keep:])
    for actual, wanted in zip(decoders.answer(session, prompt), steps, strict=True):
        check_close(actual, wanted)


def test_a_cache_that_no_attention_reads_is_refused() -> None:
    model, _ = llama_decoder()
    graph = model.graph
    past = ir.Value(name="past_key_values.2.key", shape=graph.inputs[3].shape, type=graph.inputs[3].type)
    graph.inputs.append(past)
    with pytest.raises(GraphError, match=r"no attention reads past_key_values\.2\.key"):
        find_attention(graph)


def test_one_graph_cannot_run_a_prompt_that_is_seen_as_a_whole() -> None:
    model, _ = llama_decoder()
    sites = find_attention(model.graph)
    kinds = {str(site.mask.name): MaskKind(causal=False, window=None) for site in sites}
    with pytest.raises(GraphError, match="not causal"):
        lower_attention(model.graph, sites, kinds, "any", CPU)


CONTEXT = 50
# What a key is seen by, and what is found. `i` is a query's place and `j` a key's.
MASKS = {
    "causal": ("seen = And (past, padding)", MaskKind(causal=True, window=None)),
    "window of 7": ("near = Greater (j, i7) both = And (past, near) seen = And (both, padding)", MaskKind(True, 7)),
    "wider than the context": (
        "near = Greater (j, i60) both = And (past, near) seen = And (both, padding)",
        MaskKind(True, None),
    ),
    "one token ahead": (
        "next = LessOrEqual (j, i1) seen = And (next, padding)",
        MaskKind(causal=False, window=None),
    ),
    "everything": ("seen = Or (padding, never)", MaskKind(causal=False, window=None)),
    "padding too": ("seen = Or (past, never)", MaskKind(causal=False, window=None)),
    "not the first token": (
        "rest = Greater (j, zeros) both = And (past, rest) seen = And (both, padding)",
        MaskKind(causal=False, window=CONTEXT - 1),
    ),
    "vision tokens see one another": (
        "either = Or (past, of_vision) seen = And (either, padding)",
        MaskKind(causal=False, window=None),
    ),
}
_COMMON = """
    total = Shape <start: int = 1, end: int = 2> (attention_mask)
    new = Shape <start: int = 1, end: int = 2> (position_ids)
    whole = Squeeze (total)  part = Squeeze (new)  before = Sub (whole, part)
    zero = Constant <value_int: int = 0> ()  one = Constant <value_int: int = 1> ()
    seven = Constant <value_int: int = 7> ()  sixty = Constant <value_int: int = 60> ()
    last = Constant <value_ints: ints = [-1]> ()  middle = Constant <value_ints: ints = [1, 2]> ()
    head = Constant <value_ints: ints = [1]> ()
    j = Range (zero, whole, one)  zeros = Mul (j, zero)
    row = Range (before, whole, one)  i = Unsqueeze (row, last)
    i1 = Add (i, one)  i7 = Sub (i, seven)  i60 = Sub (i, sixty)
    past = LessOrEqual (j, i)
    of_keys = Unsqueeze (attention_mask, middle)  padding = Cast <to: int = 9> (of_keys)
    negative = Less (i, zeros)  never = And (negative, padding)
    query_types = Unsqueeze (token_type_ids, last)  typed_queries = Unsqueeze (query_types, head)
    of_vision = Cast <to: int = 9> (typed_queries)
"""


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_lets_through_is_found(name: str, form: str) -> None:
    body, expected = MASKS[name]
    shape = f"{form}[batch,1,sequence,total] mask"
    closing = "mask = Or (seen, never)"
    if form == "float":
        closing = (
            "seen_all = Or (seen, never) none = Constant <value_float: float = 0.0> ()"
            " low = Constant <value_float: float = -3.4028234663852886e+38> () mask = Where (seen_all, none, low)"
        )
    inputs = (
        "int64[batch,total] attention_mask, int64[batch,sequence] position_ids, int64[batch,sequence] token_type_ids"
    )
    model = hand_made(inputs, shape, f"{_COMMON} {body} {closing}", {})
    assert classify_masks(model, list(model.graph.outputs), CONTEXT) == {"mask": expected}
