"""Generations on a TensorRT that needs no GPU (`fake_tensorrt`), against the reference engine."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from qavp_export import QavpModel
from qavp_export.engines.tensorrt.keys import TENSORRT
from qavp_export.engines.tensorrt.keys import TENSORRT_RTX as RTX
from qavp_export.errors import InputError
from tests.engines.fake_cuda import FakeBuffer
from tests.engines.fake_tensorrt import CudaGraphStrategy
from tests.engines.generations import check_close, run_all
from tests.engines.tensorrt_bundle import (
    FIXED,
    MAX_BATCH,
    Install,
    prompts,
    steps_of,
    tokens_of,
)
from tests.runtime import tiny_bundle
from tests.runtime.tiny_bundle import ASSISTANT, BOS, USER, WORDS, reference_answer

# Of the largest logit. float32 sums of up to 140 tokens in another order, 1.1e-5 was seen; keys and values of 16 bits
# differ by 2**-11 each, and dozens of them are summed.
ROUNDING, HALF_ROUNDING = 1e-4, 5e-2


@pytest.mark.parametrize("flavour", [TENSORRT, RTX])
def test_answers_are_those_of_the_definition(
    install: Install, flavour: str, pictures: list[np.ndarray[Any, Any]]
) -> None:
    fake = install(flavour)
    model = QavpModel.from_bundle(fake.bundle, flavour)
    batch = [pictures[0], None, pictures[1:3]]
    found = model.generate_ids(batch, ["w0 w3", "w1", "w2 w9 w4"], max_new_tokens=9)
    words = [([pictures[0]], "w0", "w3"), ([], "w1"), (pictures[1:3], "w2", "w9", "w4")]
    expected = [
        reference_answer([BOS, USER, *shown, *(WORDS.index(word) for word in text), ASSISTANT], 9)
        for shown, *text in words
    ]
    assert found == expected
    assert model.generate_ids(batch[0], "w0 w3", max_new_tokens=9) == expected[:1]
    assert len({tuple(answer) for answer in expected}) == 3


@pytest.mark.parametrize("aliasing", [True, False])
@pytest.mark.parametrize("lengths", [(9,), (5, 9, 1)])
def test_logits_are_those_of_the_reference(
    install: Install, reference: QavpModel, lengths: tuple[int, ...], aliasing: bool
) -> None:
    engine = install(cache=TensorProto.FLOAT, aliasing=aliasing).open()
    embeds, mask, positions = prompts(lengths)
    tokens = tokens_of(len(lengths), 7)
    sessions = reference.engine.start(), engine.start(20)
    for keep in (0, 4, 1):
        expected, found = (each.prefill(embeds, mask, positions, logits_to_keep=keep) for each in sessions)
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        real = mask[:, -keep:] == 1
        check_close(found[real], expected[real], ROUNDING)
    steps = (steps_of(each, mask, positions, tokens) for each in sessions)
    for expected, found in zip(*steps, strict=True):
        check_close(found, expected, ROUNDING)


def test_keys_and_values_of_16_bits(install: Install, reference: QavpModel) -> None:
    embeds, mask, positions = prompts((6, 12))
    sessions = reference.engine.start(), install().open().start()
    for each in sessions:
        each.prefill(embeds, mask, positions)
    steps = (steps_of(each, mask, positions, tokens_of(2, 12)) for each in sessions)
    expected, found = (np.stack(list(each)) for each in steps)
    check_close(found, expected, HALF_ROUNDING)
    assert np.abs(found - expected).max() > 0


def test_vision_tokens_are_told_apart_where_the_decoder_does(install: Install, reference: QavpModel) -> None:
    engine = install(typed=True, cache=TensorProto.FLOAT).open()
    embeds, mask, positions = prompts((3, 5))
    types = np.array([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1]])
    session = engine.start()
    found = session.prefill(embeds, mask, positions, types, logits_to_keep=1)
    weights = tiny_bundle.make_weights()
    factor = mask * (1 + positions / 10) * (1 + types)
    value, key = (np.einsum("bs,bsd->bd", each, embeds) for each in (factor, mask))
    check_close(found[:, 0], np.sin(value) @ weights.w + np.cos(key) @ weights.u, ROUNDING)
    # Without any, and behind them, there are only text tokens.
    expected = reference.engine.start()
    wanted = expected.prefill(embeds, mask, positions, logits_to_keep=1)
    session = engine.start()
    check_close(session.prefill(embeds, mask, positions, logits_to_keep=1), wanted, ROUNDING)
    for pair in zip(*(steps_of(each, mask, positions, tokens_of(2, 3)) for each in (session, expected)), strict=True):
        check_close(*pair, ROUNDING)


# --- graphs and memory ---


def test_a_step_is_captured_once_and_replayed(install: Install, reference: QavpModel) -> None:
    fake = install(cache=TensorProto.FLOAT)
    embeds, mask, positions = prompts((4, 9))
    sessions = reference.engine.start(), fake.open().start(40)
    for each in sessions:
        each.prefill(embeds, mask, positions)
    steps = (steps_of(each, mask, positions, tokens_of(2, 20)) for each in sessions)
    for number, (expected, found) in enumerate(zip(*steps, strict=True)):
        check_close(found, expected, ROUNDING)
        # The first runs as it is.
        assert (fake.device.captures, fake.device.launches) == (min(number, 1), number)


def test_a_step_that_cannot_be_captured_runs_as_it_is(install: Install, reference: QavpModel) -> None:
    fake = install(cache=TensorProto.FLOAT, capturable=False)
    embeds, mask, positions = prompts((4, 9))
    sessions = reference.engine.start(), fake.open().start(40)
    for each in sessions:
        each.prefill(embeds, mask, positions)
    steps = (steps_of(each, mask, positions, tokens_of(2, 5)) for each in sessions)
    with pytest.warns(RuntimeWarning, match="single tokens run without a CUDA graph: TensorRT failed in the embedding"):
        expected, found = (np.stack(list(each)) for each in steps)
    check_close(found, expected, ROUNDING)
    assert (fake.device.captures, fake.device.launches) == (0, 0)


@pytest.mark.parametrize("aliasing", [True, False])
def test_a_cache_that_grows_is_captured_anew(install: Install, reference: QavpModel, aliasing: bool) -> None:
    fake = install(cache=TensorProto.FLOAT, aliasing=aliasing)
    embeds, mask, positions = prompts((40, 31))
    sessions = reference.engine.start(), fake.open().start()
    for each in sessions:
        each.prefill(embeds, mask, positions)
    steps = (steps_of(each, mask, positions, tokens_of(2, 100)) for each in sessions)
    for expected, found in zip(*steps, strict=True):
        check_close(found, expected, ROUNDING)
    # 64, then 128 and 192 tokens; the first step on each is not captured. Where keys and values change sides, each side
    # has a graph of its own.
    captures = 3 if aliasing else 6
    assert fake.device.captures == captures
    assert fake.device.launches == 100 - captures


def test_no_step_copies_a_cache_that_changes_sides(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(aliasing=False)
    session = fake.open().start(40)
    embeds, mask, positions = prompts((4, 9))
    session.prefill(embeds, mask, positions)
    monkeypatch.delattr(FakeBuffer, "copy_rows")
    assert len(list(steps_of(session, mask, positions, tokens_of(2, 6)))) == 6
    assert (fake.device.captures, fake.device.launches) == (2, 4)


def test_a_cache_of_one_size_is_allocated_whole(install: Install) -> None:
    fake = install(capacity=FIXED)
    session = fake.open().start(4)
    embeds, mask, positions = prompts((40,))
    session.prefill(embeds, mask, positions)
    found = list(steps_of(session, mask, positions, tokens_of(1, FIXED[1] - 40)))
    assert len(found) == 56
    assert fake.device.captures == 1
    with pytest.raises(InputError, match="prompt and answer have 97 tokens and the decoder was built for 96; shorten"):
        session.decode(np.array([[7]]), np.ones((1, 97), np.int64), np.array([[96]]))


@pytest.mark.parametrize("aliasing", [True, False])
def test_sequences_are_taken_anew(install: Install, reference: QavpModel, aliasing: bool) -> None:
    fake = install(cache=TensorProto.FLOAT, aliasing=aliasing)
    embeds, mask, positions = prompts((4, 9, 7))
    sessions = reference.engine.start(), fake.open().start()
    for each in sessions:
        each.prefill(embeds, mask, positions)

    def go_on(rows: list[int], steps: int) -> None:
        nonlocal mask, positions
        for each in sessions:
            each.reorder(np.array(rows))
        mask, positions = mask[rows], positions[rows, -1:]
        tokens = tokens_of(len(rows), steps)
        for expected, found in zip(*(steps_of(each, mask, positions, tokens) for each in sessions), strict=True):
            check_close(found, expected, ROUNDING)
        mask, positions = np.pad(mask, ((0, 0), (0, steps)), constant_values=1), positions + steps

    sides = 1 if aliasing else 2
    go_on([0, 1, 2], 5)
    assert fake.device.captures == sides
    # As many as before stay where they are, and the graph goes on; a swap, and one that comes twice.
    go_on([2, 1, 0], 3)
    go_on([1, 0, 0], 3)
    go_on([2, 2, 2], 1)
    assert (fake.device.captures, fake.device.launches) == (sides, 12 - sides)
    go_on([1, 0, 2, 2], 4)
    go_on([3], 4)
    assert fake.device.captures == 3 * sides
    with pytest.raises(InputError, match=f"there are 5 sequences and the decoder was built for {MAX_BATCH} at once"):
        sessions[1].reorder(np.zeros(5, np.int64))


def test_a_second_prompt_starts_anew(install: Install, reference: QavpModel) -> None:
    session = install(cache=TensorProto.FLOAT).open().start()
    for lengths in ((9, 4), (3,)):
        embeds, mask, positions = prompts(lengths)
        expected = reference.engine.start()
        pair = session, expected
        found, wanted = (each.prefill(embeds, mask, positions, logits_to_keep=1) for each in pair)
        check_close(found, wanted, ROUNDING)
        steps = (steps_of(each, mask, positions, tokens_of(len(lengths), 4)) for each in pair)
        for found, wanted in zip(*steps, strict=True):
            check_close(found, wanted, ROUNDING)


def test_memory_and_contexts_of_a_generation_go_to_the_next(install: Install) -> None:
    fake = install()
    engine = fake.open()
    embeds, mask, positions = prompts((9, 4))

    def generate() -> None:
        session = engine.start()
        session.prefill(embeds, mask, positions, logits_to_keep=1)
        list(steps_of(session, mask, positions, tokens_of(2, 4)))

    generate()
    gc.collect()
    before = fake.device.allocations, fake.trt.contexts
    for _ in range(3):
        generate()
    gc.collect()
    assert (fake.device.allocations, fake.trt.contexts) == before
    # One context each for prompts, single tokens and their embeddings.
    assert fake.trt.contexts == 3


def test_tensorrt_rtx_makes_its_graphs_itself(install: Install) -> None:
    fake = install(RTX)
    engine = fake.open(RTX)
    embeds, mask, positions = prompts((9, 4))
    session = engine.start()
    session.prefill(embeds, mask, positions)
    list(steps_of(session, mask, positions, tokens_of(2, 4)))
    assert fake.device.captures == 0
    assert fake.trt.strategies.count(CudaGraphStrategy.WHOLE_GRAPH_CAPTURE) == 1
    assert fake.trt.strategies.count(CudaGraphStrategy.DISABLED) == 2


def test_threads_share_an_engine(install: Install, reference: QavpModel, pictures: list[np.ndarray[Any, Any]]) -> None:
    model = QavpModel.from_bundle(install(cache=TensorProto.FLOAT).bundle, TENSORRT)
    cases = [
        ([pictures[number % 5], None], [f"w{number} w3", f"w{number + 1}"], 3 + number % 4) for number in range(12)
    ]

    def answer(of: QavpModel, case: Any) -> Any:
        return of.generate_ids(case[0], case[1], max_new_tokens=case[2])

    expected = [answer(reference, case) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda case: answer(model, case), cases)) == expected


def test_a_generation_goes_on_in_another_thread(install: Install, reference: QavpModel) -> None:
    embeds, mask, positions = prompts((4, 9))
    sessions = reference.engine.start(), install(cache=TensorProto.FLOAT).open().start()
    for each in sessions:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(each.prefill, embeds, mask, positions).result()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(each.reorder, np.array([1, 0])).result()
    rows = np.array([1, 0])
    steps = (steps_of(each, mask[rows], positions[rows], tokens_of(2, 3)) for each in sessions)
    with ThreadPoolExecutor(1) as thread:
        expected, found = thread.map(lambda each: np.stack(list(each)), steps)
    check_close(found, expected, ROUNDING)


def test_logits_of_a_prepared_prompt(install: Install, reference: QavpModel, pictures: Any) -> None:
    prompt = reference.prepare([pictures[0], None], ["w0 w3", "w1"])
    engine = install(cache=TensorProto.FLOAT).open()
    steps = tokens_of(2, 5)
    for found, wanted in zip(run_all(engine, prompt, steps), run_all(reference.engine, prompt, steps), strict=True):
        check_close(found, wanted, ROUNDING)
