"""QavpModel end to end on the tiny bundle, against ids that NumPy computes from the definition."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qavp_export import EngineOptions, QavpModel
from qavp_export.errors import BundleError, InputError, PromptError, UnavailableError
from tests.runtime.tiny_bundle import (
    AFTER,
    ASSISTANT,
    BEFORE,
    BOS,
    CONTEXT,
    EOS,
    HIDDEN,
    IMAGE,
    USER,
    WORDS,
    reference_answer,
    reference_features,
    reference_logits,
    write_bundle,
)


def words(text):
    return [WORDS.index(word) for word in text.split()]


def chat(pictures, text):
    return [BOS, USER, *pictures, *words(text), ASSISTANT]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "original"
    return QavpModel.from_bundle(write_bundle(folder, positions="original"), "ort-reference", EngineOptions(threads=1))


@pytest.mark.parametrize("question", ["w0 w3", "w5 w3", "w19 w3", "w24 w3"])
def test_one_image_one_prompt(model, pictures, question):
    expected = reference_answer(chat([pictures[0]], question), 8)
    assert model.generate_ids(pictures[0], question, max_new_tokens=8) == [expected]


def test_answer_depends_on_the_image(model, pictures):
    answers = {tuple(model.generate_ids(picture, "w5 w3", max_new_tokens=6)[0]) for picture in pictures}
    assert len(answers) == len(pictures)


def test_several_images_in_one_prompt(model, pictures):
    expected = reference_answer(chat(pictures[1:4], "w7"), 6)
    assert model.generate_ids(pictures[1:4], "w7", max_new_tokens=6) == [expected]


def test_text_only_prompt(model):
    assert model.generate_ids(None, "w7 w8", max_new_tokens=5) == [reference_answer(chat([], "w7 w8"), 5)]


def test_text_only_batch(model):
    expected = [reference_answer(chat([], text), 4) for text in ("w7 w8", "w1")]
    assert model.generate_ids(None, ["w7 w8", "w1"], max_new_tokens=4) == expected


def test_left_padded_batch_of_unlike_prompts(model, pictures):
    images = [pictures[0], None, [pictures[1], pictures[2]], []]
    prompts = ["w5 w3", "w2", "w9 w1 w4", "w7 w8"]
    groups = [[pictures[0]], [], pictures[1:3], []]
    expected = [reference_answer(chat(group, text), 7) for group, text in zip(groups, prompts, strict=True)]
    assert model.generate_ids(images, prompts, max_new_tokens=7) == expected
    texts = model.generate(images, prompts, max_new_tokens=7)
    assert texts == [" ".join(WORDS[i] for i in ids if i >= 5) for ids in expected]


def test_each_row_stops_at_its_own_end(model, pictures):
    # "w4 w3" reaches <eos> at its 8th token, which the text leaves out; the other row goes on.
    expected = [reference_answer(chat([pictures[0]], text), 10) for text in ("w4 w3", "w0 w3")]
    assert expected[0][-1] == EOS
    assert len(expected[0]) == 8
    assert len(expected[1]) == 10
    assert model.generate_ids([pictures[0]] * 2, ["w4 w3", "w0 w3"], max_new_tokens=10) == expected
    assert "<eos>" not in model.generate(pictures[0], "w4 w3")


def test_original_positions(original, pictures):
    prompt = chat(pictures[:2], "w5 w3")
    expected = reference_answer(prompt, 6, original=True)
    assert expected != reference_answer(prompt, 6)
    assert original.generate_ids(pictures[:2], "w5 w3", max_new_tokens=6) == [expected]


def test_original_positions_in_a_batch(original, pictures):
    images, prompts = [pictures[3], pictures[:2], None], ["w5 w3", "w9", "w1 w2"]
    groups = [[pictures[3]], pictures[:2], []]
    expected = [
        reference_answer(chat(group, text), 5, original=True) for group, text in zip(groups, prompts, strict=True)
    ]
    assert original.generate_ids(images, prompts, max_new_tokens=5) == expected


def test_original_positions_follow_each_prompts_own_images(original, pictures):
    kept = [reference_features(picture)[1] for picture in pictures]
    other = next(index for index in range(1, 5) if kept[index] != kept[0])
    prepared = original.prepare([pictures[0], None, pictures[other]], ["w0", "w0", "w0"])
    assert prepared.position_ids[0, 2:4].tolist() == [2 + index for index in kept[0]]
    assert prepared.position_ids[2, 2:4].tolist() == [2 + index for index in kept[other]]


def test_prepare_states_ids_masks_positions_and_kept_indices(original, pictures):
    prepared = original.prepare([pictures[0], None], ["w0", "w1"])
    features, kept = reference_features(pictures[0])
    assert prepared.input_ids.tolist() == [
        [BOS, USER, IMAGE, IMAGE, *words("w0"), ASSISTANT],
        [0, 0, BOS, USER, *words("w1"), ASSISTANT],
    ]
    assert prepared.attention_mask.tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert prepared.position_ids.tolist() == [[0, 1, 2 + kept[0], 2 + kept[1], 6, 7], [0, 0, 0, 1, 2, 3]]
    assert prepared.next_positions.tolist() == [8, 4]
    assert [indices.tolist() for indices in prepared.kept_indices] == [kept]
    assert prepared.unpruned_tokens == (BEFORE,)
    assert prepared.token_type_ids.tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6]
    assert prepared.images_per_prompt == (1, 0)
    assert prepared.inputs_embeds.shape == (2, 6, HIDDEN)
    # float32 pooling of values below 2 in magnitude
    np.testing.assert_allclose(prepared.inputs_embeds[0, 2:4], features, atol=1e-6)


def test_logits_of_the_last_position(model, pictures):
    prepared = model.prepare(pictures[0], "w0 w3")
    expected = reference_logits(prepared.inputs_embeds[0].astype(np.float64), list(range(7)))
    logits = model.logits(pictures[0], "w0 w3")
    assert logits.shape == (1, 7, len(WORDS))
    # sums of 7 float32 values of magnitude 1, through sine and a product of length 3
    np.testing.assert_allclose(logits[0, -1], expected, atol=1e-5)


def test_stream_concatenates_to_the_answer(model, pictures):
    pieces = list(model.generate(pictures[0], "w0 w3", max_new_tokens=9, stream=True))
    assert "".join(pieces) == model.generate(pictures[0], "w0 w3", max_new_tokens=9)
    assert len(pieces) > 3


def test_stream_refuses_a_batch(model):
    with pytest.raises(InputError, match="one prompt"):
        model.generate(None, ["w0"], stream=True)


def test_stream_reports_bad_input_before_the_first_piece(model):
    with pytest.raises(PromptError):
        model.generate(None, "w0 <image>", stream=True)


def test_raw_prompt_places_its_images(model, pictures):
    expected = reference_answer([*words("w3"), pictures[0], *words("w4"), pictures[1]], 5)
    got = model.generate_ids(pictures[:2], "w3 <image> w4 <image>", max_new_tokens=5, chat_template=False)
    assert got == [expected]


@pytest.mark.parametrize(("text", "images", "found"), [("w1", 1, 0), ("<image> w1 <image>", 1, 2)])
def test_raw_prompt_with_wrong_placeholders(model, pictures, text, images, found):
    with pytest.raises(
        PromptError, match=rf"has {found} image placeholders and {images} image\(s\); write one <image>"
    ):
        model.generate(pictures[:images], text, chat_template=False)


def test_image_token_in_a_users_text_is_refused(model, pictures):
    with pytest.raises(PromptError, match="contains '<image>'"):
        model.generate(pictures[0], "w1 <image>")
    with pytest.raises(PromptError, match="contains '<image>'"):
        model.generate(None, "w1<image>w2")


def test_bundle_without_chat_template(tmp_path, pictures):
    model = QavpModel.from_bundle(write_bundle(tmp_path / "plain", chat_template=None), "ort-reference")
    with pytest.raises(PromptError, match="no chat template"):
        model.generate(pictures[0], "w1")
    expected = reference_answer([pictures[0], *words("w1")], 3)
    ids = model.generate_ids(pictures[0], "<image> w1", max_new_tokens=3, chat_template=False)
    assert ids == [expected]


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_chat_template_in_a_processors_file(tmp_path, pictures, name):
    folder = write_bundle(tmp_path / "old", chat_template=None)
    path = folder / name
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings["chat_template"] = (
        "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}w32"
    )
    path.write_text(json.dumps(settings))
    expected = reference_answer([pictures[0], *words("w9 w32")], 4)
    assert QavpModel.from_bundle(folder, "ort-reference").generate_ids(pictures[0], "w9", max_new_tokens=4) == [
        expected
    ]


def test_chat_template_that_fails_is_one_line(tmp_path):
    model = QavpModel.from_bundle(
        write_bundle(tmp_path / "odd", chat_template="{{ raise_exception('no\nway') }}"), "ort-reference"
    )
    with pytest.raises(BundleError, match=r"chat template fails \(no way\)"):
        model.generate(None, "w1")


def test_missing_jinja2_is_named(bundle, monkeypatch):
    model = QavpModel.from_bundle(bundle, "ort-reference")

    def no_jinja(*_, **__):
        raise ImportError("apply_chat_template requires jinja2 to be installed.")

    monkeypatch.setattr(model._tokenizer, "apply_chat_template", no_jinja)
    with pytest.raises(UnavailableError, match="pip install jinja2"):
        model.generate(None, "w1")


def test_generation_stops_at_the_context(model, pictures):
    # 7 tokens of prompt leave 17 of 24; this answer meets no <eos> before.
    expected = reference_answer(chat([pictures[0]], "w31 w3"), 1000)
    assert len(expected) == CONTEXT - 7
    assert model.generate_ids(pictures[0], "w31 w3", max_new_tokens=1000) == [expected]


def test_rows_of_a_batch_have_their_own_room(model):
    long = " ".join(["w0"] * (CONTEXT - 6))  # 21 tokens with <bos>, USER:, ASSISTANT:
    answers = model.generate_ids(None, [long, "w1"], max_new_tokens=6)
    assert [len(answer) for answer in answers] == [3, 6]
    assert answers[1] == reference_answer(chat([], "w1"), 6)
    assert answers[0] == reference_answer(chat([], long), 6)


@pytest.mark.parametrize("extra", [0, 1, 40])
def test_prompt_that_fills_the_context(model, pictures, extra):
    text = " ".join(["w0"] * (CONTEXT - 5 + extra))
    with pytest.raises(PromptError, match=f"has {CONTEXT + extra} tokens .* holds {CONTEXT}"):
        model.generate(pictures[0], text)
    fits = " ".join(["w0"] * (CONTEXT - 6))
    assert len(model.generate_ids(pictures[0], fits)[0]) == 1


def test_original_positions_count_the_unpruned_prompt(original, pictures):
    text = " ".join(["w0"] * (CONTEXT - 3 - BEFORE))
    with pytest.raises(PromptError, match=f"has {CONTEXT} positions"):
        original.generate(pictures[0], text)
    assert len(original.generate_ids(pictures[0], text[3:])[0]) == 1


@pytest.mark.parametrize(
    ("images", "prompts"),
    [([], []), ([None], ["w0", "w1"]), (np.zeros((4, 4, 3), np.uint8), ["w0", "w1"]), (None, 3), (None, [3])],
)
def test_arguments_that_do_not_match(model, images, prompts):
    with pytest.raises(PromptError):
        model.generate(images, prompts)


@pytest.mark.parametrize(
    "option",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}],
)
def test_options_out_of_range(model, option):
    with pytest.raises(InputError, match=next(iter(option))):
        model.generate(None, "w0", **option)


def test_sampling_repeats_with_a_seed_and_greedy_is_its_limit(model, pictures):
    def sample(**options):
        return model.generate_ids(pictures[0], "w0 w3", max_new_tokens=8, **options)

    assert sample(temperature=2.0, seed=5) == sample(temperature=2.0, seed=5)
    assert len({str(sample(temperature=2.0, seed=seed)) for seed in range(5)}) > 1
    assert sample(temperature=1e-6, seed=1) == sample()
    assert sample(temperature=2.0, top_k=1, seed=1) == sample()
    assert sample(temperature=2.0, top_p=1e-9, seed=1) == sample()


def test_sampled_row_does_not_depend_on_its_batch(model, pictures):
    options = {"max_new_tokens": 5, "temperature": 1.5, "seed": 11}
    alone = model.generate_ids(pictures[0], "w0 w3", **options)
    batch = model.generate_ids([pictures[0], None], ["w0 w3", "w1 w2 w3 w4 w5 w6"], **options)
    assert batch[0] == alone[0]


def test_concurrent_calls_do_not_mix(model, pictures):
    jobs = [(pictures[index % 5], f"w{index} w3") for index in range(24)]
    expected = [model.generate(*job, max_new_tokens=8) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda job: "".join(model.generate(*job, max_new_tokens=8, stream=True)), jobs))
    assert got == expected
    assert len(set(expected)) > 10


def test_unknown_engine_lists_the_available_ones(bundle):
    with pytest.raises(UnavailableError, match=r"'warp'.*ort-cpu"):
        QavpModel.from_bundle(bundle, engine="warp")


def test_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        QavpModel.from_bundle(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_bundle_with_a_corrupt_processor_file(bundle, tmp_path, name):
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / name).write_text("{ not json")
    with pytest.raises(BundleError) as caught:
        QavpModel.from_bundle(broken, "ort-reference")
    assert "\n" not in str(caught.value)


def test_bundle_without_a_fixed_image_size(bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "other")
    manifest = json.loads((other / "qavp.json").read_text())
    manifest["components"]["vision_encoder"]["inputs"][0]["shape"] = ["B", 3, "H", "W"]
    (other / "qavp.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no fixed image size"):
        QavpModel.from_bundle(other, "ort-reference")


def test_number_of_tokens_after_pruning(model, pictures):
    assert int((model.prepare(pictures[:3], "w0").input_ids == IMAGE).sum()) == 3 * AFTER
