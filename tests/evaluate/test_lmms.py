"""The lmms-eval adapter behind the calls that lmms-eval makes; answers from the bundle that NumPy predicts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from qavp_export.errors import InputError, UnavailableError
from tests.evaluate.lmms_interface import CacheHook, provide
from tests.runtime.tiny_bundle import (
    AFTER,
    ASSISTANT,
    BOS,
    IMAGE,
    USER,
    WORDS,
    make_weights,
    reference_answer,
    reference_features,
    reference_logits,
    write_bundle,
)

QUESTIONS = ("w0 w3", "w5 w3", "w7 w8 w9")


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in QUESTIONS]
    return [{"question": text, "array": picture} for text, picture in zip(QUESTIONS, pictures, strict=True)]


@pytest.fixture(scope="module")
def lmms() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        provide(patch)
        yield importlib.import_module("qavp_export.evaluate.lmms")
        sys.modules.pop("qavp_export.evaluate.lmms")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("lmms") / "bundle")


def make(kind: Any, bundle: Path, documents: list[dict[str, Any]], batch: int = 2) -> Any:
    # As lmms-eval's evaluator does.
    arguments = f"pretrained={bundle},engine=ort-reference,threads=1"
    model = kind.create_from_arg_string(arguments, {"batch_size": batch, "max_batch_size": None, "device": "cpu"})
    model.task_dict["shapes"] = {"test": documents}
    return model


def request(kind: str, *arguments: object) -> Any:
    from lmms_eval.api.instance import Instance

    return Instance(kind, (*arguments, "shapes", "test"), 0, {"task": "shapes", "doc_id": 0, "repeats": 1})


def visuals(document: dict[str, Any]) -> list[Image.Image]:
    return [Image.fromarray(document["array"])]


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    (picture,) = visuals(document)
    parts = [{"type": "image", "url": picture}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": parts}]


def prompt_of(document: dict[str, Any]) -> list[Any]:
    return [BOS, USER, document["array"], *map(WORDS.index, document["question"].split()), ASSISTANT]


def text_of(document: dict[str, Any], new_tokens: int) -> str:
    return " ".join(WORDS[token] for token in reference_answer(prompt_of(document), new_tokens) if token >= 5)


def test_lmms_eval_finds_the_model(lmms: Any) -> None:
    from lmms_eval.models.registry_v2 import ModelManifest

    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = [line for line in project.splitlines() if line.startswith("qavp = ")]
    entry = EntryPoint("qavp", yaml.safe_load(line.partition("= ")[2]), "lmms_eval.models")
    manifest = entry.load()()
    assert isinstance(manifest, ModelManifest)
    assert manifest.model_id == "qavp"
    for path, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        assert issubclass(kind, importlib.import_module("lmms_eval.api.model").lmms)
        assert kind.is_simple is simple
        assert module == lmms.__name__


def test_both_interfaces_answer_in_order(lmms: Any, bundle: Path, documents: list[dict[str, Any]]) -> None:
    # Settings differ, so that requests are batched out of their order.
    limits = [3, 5, 3]
    expected = [text_of(document, limit) for document, limit in zip(documents, limits, strict=True)]
    settings = [{"max_new_tokens": limit, "temperature": 0, "top_p": None, "num_beams": 1} for limit in limits]
    simple = make(lmms.QavpSimple, bundle, documents)
    asked = [
        request("generate_until", f"<image>\n{document['question']}", settings[row], visuals, row)
        for row, document in enumerate(documents)
    ]
    assert simple.generate_until(asked) == expected
    chat = make(lmms.QavpChat, bundle, documents)
    asked = [request("generate_until", "ignored", messages, settings[row], row) for row in range(len(documents))]
    assert chat.generate_until(asked) == expected
    assert chat.batch_size == 2


def test_answers_reach_the_cache(lmms: Any, bundle: Path, documents: list[dict[str, Any]]) -> None:
    model = make(lmms.QavpSimple, bundle, documents)
    model.cache_hook = CacheHook()
    (answer,) = model.generate_until([request("generate_until", "w0 w3", {"max_new_tokens": 2}, visuals, 0)])
    assert model.cache_hook.seen == [("generate_until", ("w0 w3", {"max_new_tokens": 2}), answer)]


def test_an_answer_ends_before_a_stop(lmms: Any, bundle: Path, documents: list[dict[str, Any]]) -> None:
    model = make(lmms.QavpSimple, bundle, documents)
    words = text_of(documents[0], 5).split()
    settings = {"max_new_tokens": 5, "until": ["not there", words[3], words[2]]}
    (answer,) = model.generate_until([request("generate_until", "w0 w3", settings, visuals, 0)])
    assert answer.split() == words[: min(words.index(words[2]), words.index(words[3]))]


@pytest.mark.parametrize("batch", [1, 3])
def test_losses_of_given_answers(lmms: Any, bundle: Path, documents: list[dict[str, Any]], batch: int) -> None:
    model = make(lmms.QavpSimple, bundle, documents, batch)
    document = documents[1]
    ids = reference_answer(prompt_of(document), 3)
    likely = " " + " ".join(WORDS[token] for token in ids)
    answers = [likely, " w1", " w2 w2"]
    # lmms-eval gives a text or what makes one of the document.
    targets = [likely, lambda _: " w1", " w2 w2"]
    found = model.loglikelihood(
        [request("loglikelihood", document["question"], target, visuals, 1) for target in targets]
    )
    features, _ = reference_features(document["array"])
    table = make_weights().table.astype(np.float64)
    known = [*(table[[BOS, USER]]), *features]
    known += [*table[[*map(WORDS.index, document["question"].split()), ASSISTANT]]]
    assert len(known) == 2 + AFTER + 2 + 1
    for (loss, greedy), answer in zip(found, answers, strict=True):
        embeds, losses, best = list(known), [], []
        for token in map(WORDS.index, answer.split()):
            scores = reference_logits(np.array(embeds), list(range(len(embeds))))
            scores[IMAGE] = -np.inf
            losses.append(np.log(np.exp(scores).sum()) - scores[token])
            best.append(int(scores.argmax()) == token)
            embeds.append(table[token])
        # The mean, which lmms-eval compares; graphs are float32.
        assert loss == pytest.approx(np.mean(losses), abs=1e-4)
        assert greedy is all(best)
    assert [greedy for _, greedy in found] == [True, False, False]


def test_a_choice_without_its_question(lmms: Any, bundle: Path, documents: list[dict[str, Any]]) -> None:
    # lmms-eval's mutual information asks for `("", choice)` alone.
    model = make(lmms.QavpSimple, bundle, documents)
    from lmms_eval.api.instance import Instance

    asked = Instance("loglikelihood", ("", " w1"), 0, {"task": "shapes", "doc_id": 0, "repeats": 1})
    ((loss, _),) = model.loglikelihood([asked])
    scores = reference_logits(make_weights().table[[BOS, USER, ASSISTANT]].astype(np.float64), [0, 1, 2])
    scores[IMAGE] = -np.inf
    # Graphs are float32.
    assert loss == pytest.approx(np.log(np.exp(scores).sum()) - scores[WORDS.index("w1")], abs=1e-4)


def test_what_is_not_served(lmms: Any, bundle: Path, documents: list[dict[str, Any]]) -> None:
    model = make(lmms.QavpSimple, bundle, documents)
    with pytest.raises(InputError, match="num_beams is 5"):
        model.generate_until([request("generate_until", "w1", {"num_beams": 5}, visuals, 0)])
    with pytest.raises(InputError, match="reads images, not int"):
        model.generate_until([request("generate_until", "w1", {}, lambda _: [3], 0)])
    with pytest.raises(InputError, match="empty answer"):
        model.loglikelihood([request("loglikelihood", "w1", " ", visuals, 0)])
    with pytest.raises(UnavailableError, match="several rounds"):
        model.generate_until_multi_round([])
    chat = make(lmms.QavpChat, bundle, documents)
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(InputError, match="not 'video'"):
        chat.generate_until([request("generate_until", "", lambda _: video, {}, 0)])
    with pytest.raises(InputError, match="batch_size is 'auto'"):
        lmms.QavpSimple(str(bundle), engine="ort-reference", batch_size="auto")


def test_a_bundle_without_a_chat_template(lmms: Any, tmp_path: Path, documents: list[dict[str, Any]]) -> None:
    bare = write_bundle(tmp_path / "bundle", chat_template=None)
    model = make(lmms.QavpSimple, bare, documents)
    (answer,) = model.generate_until([request("generate_until", "w5 w3", {"max_new_tokens": 2}, visuals, 1)])
    # Whatever processors add to a text without a template: this tokenizer adds nothing.
    ids = reference_answer([documents[1]["array"], WORDS.index("w5"), WORDS.index("w3")], 2)
    assert answer == " ".join(WORDS[token] for token in ids if token >= 5)
