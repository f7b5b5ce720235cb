"""A contestant in its own process, on a bundle whose answers NumPy predicts."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from qavp_export.bench.contestant import Entry, WorkerError, WorkerProcess
from qavp_export.bench.request import Request
from qavp_export.errors import InputError, UnavailableError
from qavp_export.manifest import MANIFEST_NAME
from tests.runtime.tiny_bundle import ASSISTANT, BOS, USER, WORDS, reference_answer

QUESTION = "w0 w3"
TOKENS = 6


@pytest.fixture(scope="module")
def expected(picture: np.ndarray) -> list[int]:
    prompt = [BOS, USER, picture, *(WORDS.index(word) for word in QUESTION.split()), ASSISTANT]
    ids = reference_answer(prompt, TOKENS)
    assert len(ids) == TOKENS  # else change the question
    return ids


@pytest.fixture(scope="module")
def endless(bundle: Path, expected: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, but its first answer would end after two tokens."""
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("endless") / "bundle")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["decoder"]["eos_token_ids"] = [expected[1]]
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def worker(bundle: Path, engine: str = "ort-reference") -> WorkerProcess:
    return WorkerProcess(Entry(bundle, engine, bundle.name), threads=1)


def alive(contestant: WorkerProcess) -> bool:
    return contestant._process.poll() is None


def test_answers_have_the_asked_length_and_every_stage_its_time(
    endless: Path, picture_file: Path, expected: list[int]
) -> None:
    request = Request((str(picture_file),), QUESTION, TOKENS)
    with worker(endless) as contestant:
        samples = [contestant.run(request) for _ in range(2)]
        peak = contestant.host_peak()
        assert contestant.device_peak() is None
        assert contestant.loaded.device is None
        load = contestant.load([request], clients=2, duration=0.01)
        with pytest.raises(UnavailableError, match="ort-reference runs the vision encoder whole"):
            contestant.scoring(2)
        assert alive(contestant)
    assert not alive(contestant)
    text = " ".join(WORDS[token] for token in expected if token >= 5)
    for sample in (*samples, *load.samples):
        assert sample.answer == text
        assert (sample.answer_tokens, len(sample.decode)) == (TOKENS, TOKENS - 1)
        # BOS, USER, two of four tokens of the picture, the question, ASSISTANT
        assert (sample.prompt_tokens, sample.vision_tokens, sample.vision_tokens_before) == (7, 2, 4)
        stages = [sample.preprocess, sample.vision_encoder, sample.embedding, sample.prefill, *sample.decode]
        assert min(stages) > 0
        # All are of one clock; the parts do not exceed the whole.
        assert sum(stages[:4]) <= sample.ttft < sample.end_to_end
        assert sum(stages) + sample.other == pytest.approx(sample.end_to_end, rel=1e-9)
        assert sample.tpot is not None
        assert sample.ttft + sample.tpot * (TOKENS - 1) <= sample.end_to_end
    assert len(load.samples) >= 2
    assert 0 < contestant.loaded.host_before_bytes <= peak
    assert contestant.loaded.load_seconds > 0


def test_an_engine_that_is_not_there_says_why_and_leaves_no_process(bundle: Path) -> None:
    # The tiny bundle has nothing for the other engines.
    with pytest.raises(InputError, match=r"engine\.json is missing"):
        worker(bundle, "ort-cpu")
    with pytest.raises(UnavailableError, match="does not exist"):
        worker(bundle, "no-engine")


def test_a_bad_image_is_an_error_and_the_process_goes_on(bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    with worker(bundle) as contestant:
        with pytest.raises(InputError, match=r"no\.png"):
            contestant.run(Request((str(tmp_path / "no.png"),), QUESTION, 2))
        assert contestant.run(Request((str(picture_file),), QUESTION, 2)).answer_tokens == 2


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "was killed; most likely"), (signal.SIGTERM, "ended with signal SIGTERM")]
)
def test_a_process_that_was_interrupted_is_one_line(
    bundle: Path, picture_file: Path, number: signal.Signals, message: str
) -> None:
    with worker(bundle) as contestant:
        os.kill(contestant._process.pid, number)
        contestant._process.wait()
        with pytest.raises(WorkerError, match=message) as raised:
            contestant.run(Request((str(picture_file),), QUESTION, 2))
    assert "\n" not in str(raised.value)
