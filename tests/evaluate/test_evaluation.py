"""Arms of a tiny checkpoint, exported and asked, against transformers and torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qavp_export import pipeline
from qavp_export.errors import InputError, RecipeError
from qavp_export.evaluate.accuracy import ArmScores, compare_arms
from qavp_export.evaluate.arms import ARMS, GROUPS, choose_arms
from qavp_export.evaluate.bundles import Bundles
from qavp_export.evaluate.datasets import DataSet, Item
from qavp_export.evaluate.fidelity import Fidelity, answer_freely, compare_fidelity, follow, read_images
from qavp_export.evaluate.run import Evaluation, Setup, leave_out, report
from qavp_export.evaluate.teacher_forcing import forced_logits
from qavp_export.numerics.score import minmax
from qavp_export.numerics.select import select_topk
from qavp_export.runtime import QavpModel
from tests.models.clip import clip_relevance, make_clip
from tests.models.tiny import TinySpec, make_llava

# As in tests/test_export.py: float32 sums in another order; 2e-5 was seen, of logits up to 10.
LOGIT_ROUNDING = 1e-4
QUESTIONS = (
    "what is the color",
    "is a circle left of the circle ?",
    "what",
    "the color of w20 w21 w22 ?",
    "is right ?",
)
SETUP = Setup(quantized="rtn", keep=0.2, batch=2, max_new_tokens=6)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What transformers says: greedy ids and texts, and the logits at each of the ids."""

    ids: list[list[int]]
    texts: list[str]
    logits: list[np.ndarray]


@pytest.fixture(scope="module")
def items() -> list[Item]:
    rng = np.random.default_rng(5)
    pictures = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in QUESTIONS]
    return [
        Item(str(number), picture, question, (), "odd" if number % 2 else "even")
        for number, (picture, question) in enumerate(zip(pictures, QUESTIONS, strict=True))
    ]


@pytest.fixture(scope="module")
def truth(tiny_llava: Path, items: list[Item]) -> Truth:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(tiny_llava)
    ids, texts, logits = [], [], []
    for item in items:
        content = [{"type": "image"}, {"type": "text", "text": item.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=Image.fromarray(item.image), return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            banned = [[model.config.image_token_index]]
            out = model.generate(**inputs, do_sample=False, max_new_tokens=6, bad_words_ids=banned)
            new = out[0, inputs["input_ids"].shape[1] :]
            full = inputs | {"input_ids": out, "attention_mask": torch.ones_like(out)}
            logits.append(model(**full).logits[0, -len(new) - 1 : -1].numpy())
        ids.append(new.tolist())
        texts.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    return Truth(ids, texts, logits)


@pytest.fixture(scope="module")
def bundles(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tiny_llava, "tiny-llava", tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def evaluation(bundles: Bundles) -> Evaluation:
    twice = dataclasses.replace(ARMS["w4a4+random"], seeds=2)
    evaluation = Evaluation(bundles, [*choose_arms(["full", "w4a4+hybrid"]), twice], SETUP, lambda *_: None)
    evaluation.export()
    return evaluation


@pytest.fixture(scope="module")
def model(bundles: Bundles, evaluation: Evaluation) -> QavpModel:
    del evaluation  # has exported it
    return QavpModel.from_bundle(bundles.path(ARMS["full"].recipes("rtn", 0.2, 0)[0]))


def test_full_precision_answers_as_transformers_does(evaluation: Evaluation, items: list[Item], truth: Truth) -> None:
    wrong = "w66 w66 w66"
    answered = [dataclasses.replace(item, answers=(text,)) for item, text in zip(items, truth.texts, strict=True)]
    answered[1] = dataclasses.replace(answered[1], answers=(wrong,))
    data = DataSet("tiny", tuple(answered), "exact")
    results = evaluation.accuracy(data)
    assert results["full"].scores.tolist() == [[1, 0, 1, 1, 1]]
    assert results["w4a4+hybrid"].manifest.vision_tokens.after == 5
    found = report(results, {}, data, 0, SETUP)
    assert found["arms"]["full"]["accuracy"] == 0.8
    assert found["arms"]["full"]["by_type"]["even"] == {"questions": 3, "accuracy": 1, "interval_95": [1, 1]}
    assert found["arms"]["full"]["by_type"]["odd"]["accuracy"] == 0.5
    assert [(pair["a"], pair["b"]) for pair in found["comparisons"]] == [
        ("w4a4+hybrid", "full"),
        ("w4a4+random", "full"),
        ("w4a4+random", "w4a4+hybrid"),
    ]
    json.dumps(found, allow_nan=False)


def test_every_seed_answers_for_itself(bundles: Bundles, evaluation: Evaluation, items: list[Item]) -> None:
    models = [QavpModel.from_bundle(bundles.path(recipe)) for recipe in ARMS["w4a4+random"].recipes("rtn", 0.2, 0)[:2]]
    said = [[model.generate(item.image, item.prompt, max_new_tokens=6) for item in items] for model in models]
    # What the first seed says of even items is right, and what the second says of odd ones.
    right = [said[number % 2][number] for number in range(len(items))]
    answered = [dataclasses.replace(item, answers=(text,)) for item, text in zip(items, right, strict=True)]
    found = evaluation.accuracy(DataSet("tiny", tuple(answered), "exact"))["w4a4+random"]
    assert found.scores.tolist() == [[answer == one for answer, one in zip(row, right, strict=True)] for row in said]
    assert found.scores.min() == 0
    assert found.to_dict(["all"] * len(items), 0)["accuracy"] == pytest.approx(found.scores.mean())  # float sums


def test_forced_logits_are_those_of_transformers_in_any_batch(
    model: QavpModel, items: list[Item], truth: Truth
) -> None:
    # Answers of other lengths: a batch pads them, and a short one rides along.
    given = [ids[: 1 + number] for number, ids in enumerate(truth.ids)]
    prepared = model.prepare([[item.image] for item in items], [item.prompt for item in items])
    for found, expected, ids in zip(forced_logits(model, prepared, given), truth.logits, given, strict=True):
        assert found.shape == (len(ids), 67)
        np.testing.assert_allclose(found, expected[: len(ids)], atol=LOGIT_ROUNDING)


def test_the_reference_follows_itself(model: QavpModel, items: list[Item], truth: Truth, tmp_path: Path) -> None:
    reference = answer_freely(model, items, tmp_path, 2, 6, lambda _: None)
    assert list(reference.answers) == truth.ids
    same = follow(model, items, reference, 3, lambda _: None)
    # Log probabilities are kept in float32: 1e-7 of numbers up to 20.
    np.testing.assert_allclose(same.kl, 0, atol=1e-5)
    assert same.agreement.tolist() == [1] * len(items)


def test_divergence_is_torchs(
    bundles: Bundles, evaluation: Evaluation, model: QavpModel, items: list[Item], truth: Truth
) -> None:
    arm = QavpModel.from_bundle(bundles.path(ARMS["w4a4+hybrid"].recipes("rtn", 0.2, 0)[0]))
    found = evaluation.fidelity(items)["w4a4+hybrid"]
    allowed = [token for token in range(67) if token != model.manifest.vision_tokens.image_token_id]
    for index, item in enumerate(items):
        ids = truth.ids[index]
        (logits,) = forced_logits(arm, arm.prepare([[item.image]], [item.prompt]), [ids])
        expected = torch.from_numpy(truth.logits[index][:, allowed]).double().log_softmax(-1)
        actual = torch.from_numpy(logits[:, allowed]).double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum") / len(ids)
        # Both sides carry LOGIT_ROUNDING; here prompts come alone, there in batches.
        assert found.kl[index] == pytest.approx(float(kl), abs=10 * LOGIT_ROUNDING)
        assert found.agreement[index] == float((actual.argmax(-1) == expected.argmax(-1)).double().mean())
    assert found.kl.min() > 0.01


def test_fidelity_of_seeds_is_their_mean(
    bundles: Bundles, evaluation: Evaluation, model: QavpModel, items: list[Item], tmp_path: Path
) -> None:
    reference = answer_freely(model, items, tmp_path, 2, 6, lambda _: None)
    runs = [
        follow(QavpModel.from_bundle(bundles.path(recipe)), items, reference, 2, lambda _: None)
        for recipe in ARMS["w4a4+random"].recipes("rtn", 0.2, 0)[:2]
    ]
    found = evaluation.fidelity(items)
    assert set(found) == {"w4a4+hybrid", "w4a4+random"}
    assert runs[0].kl.tolist() != runs[1].kl.tolist()
    np.testing.assert_allclose(found["w4a4+random"].kl, (runs[0].kl + runs[1].kl) / 2)
    np.testing.assert_allclose(found["w4a4+random"].agreement, (runs[0].agreement + runs[1].agreement) / 2)


def test_what_is_exported_is_found_again(tiny_llava: Path, bundles: Bundles, evaluation: Evaluation) -> None:
    del evaluation  # has exported it
    recipe = ARMS["full"].recipes("rtn", 0.2, 0)[0]
    stages: list[str] = []
    path = bundles.get(recipe, lambda stage, *_: stages.append(stage))
    assert not stages
    again = Bundles(tiny_llava, "tiny-llava", path.parent)
    assert again.path(recipe) == path
    other = ARMS["w4a4+random"].recipes("rtn", 0.2, 0)
    assert len({bundles.path(one) for one in [recipe, *other]}) == 6
    assert bundles.path(ARMS["w4a4+semantic"].recipes("rtn", 0.4, 0)[0]) != bundles.path(other[0])


def test_a_changed_checkpoint_has_other_bundles(tiny_llava: Path, bundles: Bundles, tmp_path: Path) -> None:
    recipe = ARMS["full"].recipes("rtn", 0.2, 0)[0]
    copy = _copy(tiny_llava, tmp_path / "tiny-llava")
    changed = Bundles(copy, "tiny-llava", bundles.path(recipe).parent)
    assert changed.path(recipe) != bundles.path(recipe)


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{}"), ("qavp.json", "{}"), ("tokenizer.json", None)])
def test_a_damaged_bundle_is_exported_anew(
    tiny_llava: Path,
    bundles: Bundles,
    evaluation: Evaluation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: str | None,
) -> None:
    del evaluation  # has exported what is copied
    recipe = ARMS["full"].recipes("rtn", 0.2, 0)[0]
    exported: list[tuple[Path, bool]] = []
    monkeypatch.setattr(pipeline, "export", lambda *args, **named: exported.append((args[2], named["force"])))
    copy = Bundles(tiny_llava, "tiny-llava", tmp_path)
    path = copy.path(recipe)
    shutil.copytree(bundles.path(recipe), path)
    assert copy.get(recipe, lambda *_: None) == path
    assert not exported
    (path / file).unlink() if content is None else (path / file).write_text(content)
    assert copy.get(recipe, lambda *_: None) == path
    assert exported == [(path, True)]


def test_recipes_are_checked_before_anything_is_exported(tiny_llava: Path, tmp_path: Path) -> None:
    bundles = Bundles(tiny_llava, "tiny-llava", tmp_path / "work")
    arms = choose_arms(["full"], ["mine=rtn,group_size=56"])
    with pytest.raises(RecipeError, match="group_size 56"):
        Evaluation(bundles, arms, SETUP, lambda *_: None)
    assert not (tmp_path / "work").exists()


def test_a_question_reaches_clip_and_the_foreground_that_is_kept_is_counted(
    tiny_llava: Path, items: list[Item], tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "clip", tiny_llava)
    bundles = Bundles(tiny_llava, "tiny-llava", tmp_path / "work", clip=(clip, "tiny-clip"))
    # A float decoder leaves the vision tower in float: the tokens are those of transformers.
    (arm,) = choose_arms([], ["text=none,semantic=text,alpha=1,select=topk"])
    evaluation = Evaluation(bundles, [arm], SETUP, lambda *_: None)
    evaluation.export()
    processor: Any = AutoProcessor.from_pretrained(tiny_llava)
    pixels = processor.image_processor([item.image for item in items], return_tensors="np")["pixel_values"]
    relevance = clip_relevance(clip, pixels.astype(np.float32), list(QUESTIONS))
    kept = select_topk(minmax(relevance), 5)
    masks = np.random.default_rng(1).random((len(items), 25)) < 0.5
    shown = [dataclasses.replace(item, foreground=mask) for item, mask in zip(items, masks, strict=True)]
    # Nothing is to be seen in the last picture, and of the one before it nothing is known.
    shown[-1] = dataclasses.replace(shown[-1], foreground=np.zeros(25, bool))
    shown[-2] = items[-2]
    found = evaluation.accuracy(DataSet("tiny", tuple(shown), "exact"))["text"]
    expected = np.mean([mask[row].sum() / mask.sum() for mask, row in zip(masks[:-2], kept, strict=False)])
    assert found.foreground_kept == pytest.approx(expected)  # float sums
    assert found.manifest.vision_tokens.question is not None
    assert found.manifest.vision_tokens.question.source == "tiny-clip"
    # A mask of other vision tokens says nothing of these.
    other = [dataclasses.replace(item, foreground=np.ones(24, bool)) for item in items]
    assert evaluation.accuracy(DataSet("tiny", tuple(other), "exact"))["text"].foreground_kept is None
    recipe = arm.recipes("rtn", 0.2, 0)[0]
    changed = Bundles(tiny_llava, "tiny-llava", tmp_path / "work", clip=(_copy(clip, tmp_path / "copy"), "tiny-clip"))
    assert changed.path(recipe) != bundles.path(recipe)
    full = ARMS["full"].recipes("rtn", 0.2, 0)[0]
    assert changed.path(full) == bundles.path(full) == Bundles(tiny_llava, "tiny-llava", tmp_path / "work").path(full)


def test_arms_whose_scorer_the_checkpoint_lacks_are_left_out(tiny_llava: Path, tmp_path: Path) -> None:
    siglip = make_llava(tmp_path / "siglip", TinySpec(vision="siglip"))
    bundles = Bundles(siglip, "siglip", tmp_path / "work")
    kept, left_out = leave_out(bundles, choose_arms(["scorers"]), SETUP)
    assert len(kept) + len(left_out) == len(GROUPS["scorers"])
    lacking = {name for name in GROUPS["scorers"] if name.endswith(("cls", "text"))}
    assert set(left_out) == lacking
    assert len(lacking) == 8
    assert "needs a vision tower with a [CLS] token" in left_out["w4a4+dpp-cls"]
    assert "give --clip CHECKPOINT" in left_out["w4a4+hybrid-text"]
    with pytest.raises(RecipeError, match=r"arm w4a4\+cls: semantic 'cls' needs a vision tower with a \[CLS\] token"):
        leave_out(bundles, choose_arms(["scorers", "w4a4+cls"]), SETUP)
    with pytest.raises(RecipeError, match="no arm is left to evaluate: semantic 'cls' needs"):
        leave_out(bundles, [dataclasses.replace(ARMS["w4a4+cls"], optional=True)], SETUP)
    # What is wrong with the recipe itself is no reason to leave an arm out.
    with pytest.raises(RecipeError, match="keep"):
        leave_out(bundles, choose_arms(["scorers"]), dataclasses.replace(SETUP, keep=2.0))
    assert leave_out(Bundles(tiny_llava, "tiny", tmp_path / "work"), choose_arms(["paper"]), SETUP)[1] == {}


def test_a_clip_that_no_arm_reads_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    bundles = Bundles(
        tiny_llava, "tiny", tmp_path / "work", clip=(make_clip(tmp_path / "clip", tiny_llava), "tiny-clip")
    )
    setup = dataclasses.replace(SETUP, clip="tiny-clip")
    with pytest.raises(RecipeError, match="--clip is read by no arm"):
        leave_out(bundles, choose_arms(["paper"]), setup)
    kept, left_out = leave_out(bundles, choose_arms(["scorers"]), setup)
    assert (len(kept), left_out) == (len(GROUPS["scorers"]), {})


def test_fidelities_are_compared_prompt_by_prompt() -> None:
    found = {
        "w4a4": Fidelity(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.5, 0.0])),
        "w4a4+dpp": Fidelity(np.array([0.5, 1.5, 2.5]), np.array([1.0, 1.0, 1.0])),
    }
    (pair,) = compare_fidelity(found, 0)
    assert (pair["a"], pair["b"]) == ("w4a4+dpp", "w4a4")
    # The same difference at every prompt: whichever are drawn, it is the mean.
    assert [pair["kl"]["difference"], *pair["kl"]["interval_95"]] == pytest.approx([-0.5] * 3)  # float sums
    assert pair["top1_agreement"]["difference"] == 0.5
    assert pair["top1_agreement"]["interval_95"][0] < 0.5 < pair["top1_agreement"]["interval_95"][1]


def _copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def scores(name: str, *rows: list[float]) -> ArmScores:
    return ArmScores(ARMS[name], None, ("a",), np.array(rows))  # type: ignore[arg-type]  # the manifest is not read


def test_comparisons_of_known_scores() -> None:
    results = {
        "full": scores("full", [1, 1, 1, 1, 0, 1]),
        "w4a4": scores("w4a4", [1, 0.6, 0, 0, 0.3, 0]),
        "w4a4+random": scores("w4a4+random", [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]),
    }
    first, second, third = compare_arms(results, 0)
    assert (first.a, first.b) == ("w4a4", "full")
    assert first.difference.estimate == pytest.approx((1.9 - 5) / 6)  # float sums
    # Scores from a half on count as right: the arms differ on three questions, all for full: 2 / 2^3.
    assert first.test is not None
    assert (first.test.only_a, first.test.only_b, first.test.p) == (0, 3, 0.25)
    assert (second.a, second.b, second.test) == ("w4a4+random", "full", None)
    assert second.difference.estimate == pytest.approx((2 - 5) / 6)
    assert (third.a, third.b, third.test) == ("w4a4+random", "w4a4", None)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = read_images(tmp_path, "What?", None, 0)
    assert [(item.id, item.image, item.prompt) for item in found] == [
        ("a.jpg", tmp_path / "a.jpg", "What?"),
        ("b.PNG", tmp_path / "b.PNG", "What?"),
    ]
    assert len(read_images(tmp_path, "What?", 1, 0)) == 1
    with pytest.raises(InputError, match="is not a folder"):
        read_images(tmp_path / "none", "What?", None, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        read_images(tmp_path / "empty", "What?", None, 0)
