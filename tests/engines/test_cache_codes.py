"""A key/value cache of 8-bit codes; tests/families, where decoders are traced, compare every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qavp_export.engines import sequences
from qavp_export.engines.ort.cached import CachedDecoder, CachedSession
from qavp_export.engines.ort.codes import check_codes as check_runtime
from qavp_export.engines.ort.codes import encode
from qavp_export.engines.ort.growing import GrowingSession
from qavp_export.engines.ort.lowering.capabilities import CPU
from qavp_export.engines.ort.lowering.codes import cache_probe
from qavp_export.engines.ort.session import Graph, Values
from qavp_export.errors import BundleError, GraphError, QavpError, UnavailableError
from tests.engines.cached_decoders import Decoders, check_close, check_codes
from tests.engines.lowered import open_lowered
from tests.engines.prompts import Prompt
from tests.models.tiny import TinySpec
from tests.passes.decoders import llama_decoder, trace_decoder


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    """A Llama decoder: two layers, six heads of which three share keys and values."""
    return Decoders.of(*llama_decoder(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def coded(decoders: Decoders) -> CachedDecoder:
    return decoders.coded()


def test_codes_of_numbers() -> None:
    # Two sequences of two and of three tokens, one head of two channels.
    filled = np.zeros((2, 1, 4, 2), np.float32)
    filled[0, 0] = [[127, -1], [-63.5, 2], [900, 900], [900, 900]]
    filled[1, 0] = [[-3, 0.5], [1, 4], [2, -1], [900, 900]]
    codes, scales = encode(filled, np.array([2, 3]), 5)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (np.int8, (2, 1, 5, 2), np.float32, (2, 1, 2))
    # 2 * 127 / 127, and for a channel whose largest is below half of that, half; 2 * 3 / 127 and 2 * 4 / 127.
    np.testing.assert_allclose(scales[:, 0], [[2, 1], [6 / 127, 8 / 127]], rtol=1e-6)
    # 63.5 and -31.75; ties go to the even neighbour.
    assert codes[0, 0].tolist() == [[64, -1], [-32, 2], [0, 0], [0, 0], [0, 0]]
    # -63.5, 7.9; 21.2, 63.5; 42.3, -15.9.
    assert codes[1, 0].tolist() == [[-64, 8], [21, 64], [42, -16], [0, 0], [0, 0]]


def test_a_head_of_zeros_has_codes_of_zero() -> None:
    codes, scales = encode(np.zeros((1, 2, 3, 4), np.float32), np.array([3]), 3)
    assert not codes.any()
    assert (scales > 0).all()


def test_prompts_become_codes(decoders: Decoders, coded: CachedDecoder) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (9, 5), 0)
    session, growing = CachedSession(coded, 30), GrowingSession(decoders.growing)
    check_close(decoders.prefill(session, prompt), decoders.prefill(growing, prompt))
    exact = [growing._cache[name].numpy() for name in growing._past_names]
    for codes, scales, floats in zip(session._cache, session._scales, exact, strict=True):
        assert codes.shape()[2] == 64
        for row, length in enumerate((9, 5)):
            tokens = floats[row, :, 9 - length :]
            largest = np.abs(tokens).max(axis=1)
            largest = np.maximum(largest, largest.max(axis=1, keepdims=True) / 2)
            step = 2 * largest / 127
            np.testing.assert_allclose(scales.numpy()[row, 0], step.ravel(), rtol=1e-4)
            # Codes next to a tie turn on float32 rounding.
            wanted = tokens / step[:, None]
            np.testing.assert_allclose(codes.numpy()[row, :, :length], wanted, rtol=0, atol=0.5 + 1e-2)
            assert not codes.numpy()[row, :, length:].any()


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_attention_reads_what_the_codes_stand_for(tmp_path: Path, kv_heads: int) -> None:
    model, plan = llama_decoder() if kv_heads == 2 else trace_decoder(TinySpec(kv_heads=kv_heads))
    check_codes(Decoders.of(model, plan, tmp_path), Prompt.random(plan.vocab_size, (11, 4, 7), 9))


def test_tokens_beyond_the_prompts_values_are_clamped(decoders: Decoders, coded: CachedDecoder) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (4,), 3)
    session = CachedSession(coded, 0)
    decoders.prefill(session, prompt)
    # Scales a tenth of what they are: nearly everything is beyond.
    for scales in session._scales:
        scales.numpy()[...] *= 0.1
    list(decoders.answer(session, prompt))
    written = np.stack([codes.numpy()[0, :, 4:7] for codes in session._cache])
    assert ((written == 127) | (written == -128)).mean() > 0.3


@pytest.mark.parametrize("capacity", [0, 9, 40])
def test_a_cache_of_codes_that_grows_loses_nothing(
    decoders: Decoders, coded: CachedDecoder, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (7, 3), 35)
    wide = CachedSession(coded, 64)
    decoders.prefill(wide, prompt)
    expected = list(decoders.answer(wide, prompt))
    monkeypatch.setattr(sequences, "_STEP", 8)
    session = CachedSession(coded, capacity)
    decoders.prefill(session, prompt)
    found = set()
    for actual, wanted in zip(decoders.answer(session, prompt), expected, strict=True):
        check_close(actual, wanted)
        found.add(session._cache[0].shape()[2])
    assert len(found) == {0: 4, 9: 3, 40: 2}[capacity]


def test_sequences_do_not_see_their_batch(decoders: Decoders, coded: CachedDecoder) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (8, 3, 5), 6)
    batch = CachedSession(coded, 0)
    logits = [decoders.prefill(batch, prompt)[:, -1], *decoders.answer(batch, prompt)]
    for row, length in enumerate((8, 3, 5)):
        alone = Prompt(
            prompt.ids[row : row + 1, 8 - length :],
            prompt.mask[row : row + 1, 8 - length :],
            prompt.answer[row : row + 1],
        )
        session, taken = CachedSession(coded, 0), CachedSession(coded, 0)
        check_close(decoders.prefill(session, alone)[:, -1], logits[0][row : row + 1])
        decoders.prefill(taken, prompt)
        taken.reorder(np.array([row]))
        # A prompt's float32 sums depend on its length, and codes next to a tie turn on them, to their neighbour.
        for codes, batched in zip(session._cache, taken._cache, strict=True):
            pair = [cache.numpy()[0, :, :length].astype(np.int64) for cache in (codes, batched)]
            np.testing.assert_allclose(*pair, rtol=0, atol=1)
        for actual, wanted in zip(decoders.answer(session, alone), logits[1:], strict=True):
            np.testing.assert_allclose(actual, wanted[row : row + 1], rtol=0, atol=np.abs(wanted[row]).max() / 127)
        # From the same codes the answers are the same.
        for actual, wanted in zip(decoders.answer(taken, alone), logits[1:], strict=True):
            check_close(actual, wanted[row : row + 1])


def test_reordered_rows_keep_their_scales(decoders: Decoders, coded: CachedDecoder) -> None:
    prompt = Prompt.random(decoders.spec.vocab_size, (7, 3, 5), 4)
    straight = CachedSession(coded, 0)
    decoders.prefill(straight, prompt)
    expected = list(decoders.answer(straight, prompt))
    session = CachedSession(coded, 0)
    decoders.prefill(session, prompt)
    mask, positions, rows = prompt.mask, prompt.positions[:, -1:], np.arange(3)
    # Rows are repeated, dropped and turned around.
    for number, order in enumerate(([2, 0, 0, 1], [3, 3, 1, 2], [1, 0], [1, 1, 0])):
        session.reorder(np.array(order))
        mask, positions, rows = mask[order], positions[order] + 1, rows[order]
        mask = np.concatenate([mask, np.ones((len(order), 1), np.int64)], axis=1)
        logits = session.decode(prompt.answer[rows, number][:, None], mask, positions)
        check_close(logits[:, 0], expected[number][rows])


def test_a_session_of_codes_starts_anew_with_every_prompt(decoders: Decoders, coded: CachedDecoder) -> None:
    session = CachedSession(coded, 0)
    for lengths in ((9, 4), (3,), (2, 6, 6)):
        prompt = Prompt.random(decoders.spec.vocab_size, lengths, 3)
        fresh = CachedSession(coded, 0)
        check_close(decoders.prefill(session, prompt), decoders.prefill(fresh, prompt))
        for actual, wanted in zip(decoders.answer(session, prompt), decoders.answer(fresh, prompt), strict=True):
            check_close(actual, wanted)


@pytest.mark.parametrize("phase", ["prefill", "any"])
def test_prompts_do_not_read_codes(decoders: Decoders, phase: str) -> None:
    with pytest.raises(GraphError, match="only single tokens read codes"):
        decoders.lowering.body(phase, "packed", CPU.with_codes())  # type: ignore[arg-type]


def test_this_runtime_reads_codes(tmp_path: Path) -> None:
    check_runtime(lambda: open_lowered(cache_probe(), tmp_path, "probe"))


class _Wrong(Graph):
    """A probe that rounds what is new downwards, or that does not run."""

    def __init__(self, graph: Graph, *, fails: bool) -> None:
        self._graph = graph
        self._fails = fails

    def run(self, inputs: Values) -> Values:
        if self._fails:
            raise QavpError("no such kernel") from ValueError()
        outputs = self._graph.run(inputs)
        keys = outputs["keys"].numpy()
        keys[0, 0, 2] -= 1
        return outputs


@pytest.mark.parametrize(("fails", "reason"), [(True, "no such kernel"), (False, "over codes is not exact")])
def test_a_runtime_that_does_not_is_refused(tmp_path: Path, fails: bool, reason: str) -> None:
    graph = open_lowered(cache_probe(), tmp_path, "probe")
    with pytest.raises(UnavailableError, match=f"{reason}.*install 1.27 or newer, or leave kv_cache=int8") as caught:
        check_runtime(lambda: _Wrong(graph, fails=fails))
    assert caught.value.exit_code == 3


def test_a_missing_probe_is_not_the_runtimes_fault() -> None:
    def missing() -> Graph:
        raise BundleError("there is none")

    with pytest.raises(BundleError, match="there is none"):
        check_runtime(missing)
