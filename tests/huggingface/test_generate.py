"""`generate` against QavpModel on the same bundle, and against the Hugging Face model on the unpruned float bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers import pipeline as transformers_pipeline

from qavp_export.errors import InputError, PromptError

EOS, IMAGE = 2, 4
QUESTIONS = ["what is the color of the circle ?", "the color ?", "left or right ?", "is the circle left ?"]


def chat(processor, text, images):
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encode(processor, groups, questions):
    """What the processor makes of prompts with a group of pictures each, padded on the left."""
    texts = [chat(processor, text, len(group)) for text, group in zip(questions, groups, strict=True)]
    pictures = [picture for group in groups for picture in group]
    return processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")


def answers(sequences, inputs):
    """The new tokens of each sequence, up to the one that ends it."""
    rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.fixture
def one(processor, pictures):
    return encode(processor, [pictures[:1]], QUESTIONS[:1])


@pytest.fixture
def batch(processor, pictures):
    """One picture, two, none: prompts of three lengths."""
    return encode(processor, [pictures[:1], pictures[1:3], []], QUESTIONS[:3])


@pytest.mark.parametrize(
    ("which", "options"), [("float_model", {}), ("pruned_model", {}), ("pruned_model", {"keep": 0.7})]
)
def test_greedy_is_what_qavp_model_generates(which, options, request, batch, pictures):
    model = request.getfixturevalue(which)
    groups = [pictures[:1], pictures[1:3], None]
    expected = model.model.generate_ids(groups, QUESTIONS[:3], max_new_tokens=12, **options)
    sequences = model.generate(**batch, max_new_tokens=12, do_sample=False, **options)
    assert answers(sequences, batch) == expected
    assert len({str(answer) for answer in expected}) == 3


def test_sequences_begin_with_the_given_prompts(pruned_model, batch):
    sequences = pruned_model.generate(**batch, max_new_tokens=2)
    assert torch.equal(sequences[:, :-2], batch["input_ids"])
    assert int((sequences == IMAGE).sum()) == 3 * 25


def test_text_alone(pruned_model, processor):
    inputs = encode(processor, [[]], ["what is left ?"])
    expected = pruned_model.model.generate_ids(None, "what is left ?", max_new_tokens=6)
    assert answers(pruned_model.generate(**inputs, max_new_tokens=6), inputs) == expected


def test_padding_on_the_right_and_no_mask(pruned_model, processor, pictures, batch):
    expected = answers(pruned_model.generate(**batch, max_new_tokens=6), batch)
    texts = [chat(processor, text, images) for text, images in zip(QUESTIONS, (1, 2, 0), strict=False)]
    right = processor(images=pictures[:3], text=texts, padding=True, padding_side="right", return_tensors="pt")
    assert right["attention_mask"][2, -1] == 0
    assert answers(pruned_model.generate(**right, max_new_tokens=6), right) == expected
    del batch["attention_mask"]
    assert answers(pruned_model.generate(**batch, max_new_tokens=6), batch) == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_the_hugging_face_model_generates_the_same(float_model, torch_model, processor, pictures, options):
    inputs = encode(processor, [pictures[:1], pictures[1:2]], QUESTIONS[:2])
    settings = {"max_new_tokens": 10, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = torch_model.generate(**inputs, **settings, **options, suppress_tokens=[IMAGE])
    got = float_model.generate(**inputs, **settings, **options)
    assert torch.equal(got.sequences, expected.sequences)
    if "num_beams" in options:
        greedy = float_model.generate(**inputs, max_new_tokens=10)
        assert not torch.equal(expected.sequences[: len(greedy)], greedy)
        # float32 logits of magnitude 10 through two layers, in another order of summation
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=0)


def test_beams_of_a_prompt_with_two_pictures(float_model, torch_model, processor, pictures):
    inputs = encode(processor, [pictures[:1], pictures[1:3]], QUESTIONS[:2])
    got = answers(float_model.generate(**inputs, max_new_tokens=8, num_beams=3), inputs)
    for row, group in enumerate((pictures[:1], pictures[1:3])):
        alone = encode(processor, [group], [QUESTIONS[row]])
        expected = torch_model.generate(**alone, max_new_tokens=8, num_beams=3, suppress_tokens=[IMAGE])
        assert got[row] == answers(expected, alone)[0]


def test_images_are_encoded_and_prompts_run_once_for_all_beams(pruned_model, one, monkeypatch):
    engine = pruned_model.model.engine
    encoded, prompts = [], []
    encode_images, start = engine.encode_images, engine.start

    def counted_images(*arguments):
        encoded.append(arguments)
        return encode_images(*arguments)

    def counted_start():
        session = start()
        prefill = session.prefill

        def counted_prefill(embeds, *rest, logits_to_keep):
            prompts.append(len(embeds))
            return prefill(embeds, *rest, logits_to_keep=logits_to_keep)

        session.prefill = counted_prefill
        return session

    monkeypatch.setattr(engine, "encode_images", counted_images)
    monkeypatch.setattr(engine, "start", counted_start)
    pruned_model.generate(**one, max_new_tokens=3, num_beams=4)
    assert len(encoded) == 1
    assert prompts == [1]


def test_sampling_repeats_with_the_seed(pruned_model, one):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return pruned_model.generate(**one, max_new_tokens=8, do_sample=True, temperature=2.0, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    several = sample(1, num_return_sequences=3)
    assert len({str(row) for row in several.tolist()}) == 3
    assert torch.equal(sample(1, top_k=1), pruned_model.generate(**one, max_new_tokens=8))


def test_sampling_is_that_of_the_hugging_face_model(float_model, torch_model, one):
    settings = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.5, "top_k": 20}
    torch.manual_seed(5)
    expected = torch_model.generate(**one, **settings, suppress_tokens=[IMAGE])
    torch.manual_seed(5)
    assert torch.equal(float_model.generate(**one, **settings), expected)


def test_the_image_token_is_never_generated(pruned_model, one):
    favoured = {(IMAGE,): 1e3}
    sequences = pruned_model.generate(**one, max_new_tokens=5, sequence_bias=favoured)
    assert IMAGE not in sequences[0, -5:].tolist()


def test_streamers_give_what_is_returned(pruned_model, processor, one, capsys):
    expected = processor.tokenizer.decode(answers(pruned_model.generate(**one, max_new_tokens=8), one)[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    pruned_model.generate(**one, max_new_tokens=8, streamer=streamer)
    assert "".join(streamer) == expected
    pruned_model.generate(**one, max_new_tokens=8, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected.strip()


def test_stopping_criteria_stop(pruned_model, one):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):  # noqa: ARG002
            return torch.full((len(input_ids),), input_ids.shape[1] >= one["input_ids"].shape[1] + 3)

    full = pruned_model.generate(**one, max_new_tokens=8)
    assert torch.equal(pruned_model.generate(**one, max_new_tokens=8, stopping_criteria=[AfterThree()]), full[:, :-5])
    answer = full[0, -8:].tolist()
    # The last token that comes for the first time, and not right away.
    end = max(index for index in range(1, 7) if answer[index] not in answer[:index])
    stopped = pruned_model.generate(**one, max_new_tokens=8, eos_token_id=answer[end])
    assert torch.equal(stopped, full[:, : end - 7])


def test_an_answer_ends_where_the_context_is_full(pruned_model, processor, pictures):
    # 128 positions, of which the longer prompt takes 120: 25 for the unpruned picture, 93 words, begin and end.
    long = " ".join(["color"] * 93)
    inputs = encode(processor, [pictures[:1], []], [long, QUESTIONS[0]])
    expected = pruned_model.model.generate_ids([pictures[0], None], [long, QUESTIONS[0]], max_new_tokens=20)
    assert len(expected[0]) == 8 < len(expected[1])
    assert EOS not in expected[0]
    pad = pruned_model.generation_config.pad_token_id
    got = answers(pruned_model.generate(**inputs, max_new_tokens=20), inputs)
    assert got[1] == expected[1]
    assert got[0] == expected[0] + [pad] * (len(got[0]) - len(expected[0]))
    with pytest.raises(PromptError, match="holds 128"):
        pruned_model.generate(**encode(processor, [pictures[:1]], [" ".join(["the"] * 120)]))


def test_no_cache_and_a_configuration_object(pruned_model, one):
    expected = pruned_model.generate(**one, max_new_tokens=6)
    assert torch.equal(pruned_model.generate(**one, max_new_tokens=6, use_cache=False), expected)
    settings = GenerationConfig(max_new_tokens=6)
    assert torch.equal(pruned_model.generate(one.pop("input_ids"), generation_config=settings, **one), expected)


def test_forward_gives_the_logits_and_goes_on(float_model, torch_model, one):
    with torch.no_grad():
        expected = torch_model(**one).logits
    output = float_model(**one)
    # float32 logits of magnitude 10 through two layers, in another order of summation
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)
    token = expected[:, -1:].argmax(-1)
    longer = {**one, "input_ids": torch.cat([one["input_ids"], token], 1), "attention_mask": None}
    with torch.no_grad():
        expected = torch_model(**longer).logits[:, -1:]
    again = float_model(token, past_key_values=output.past_key_values, return_dict=False)
    torch.testing.assert_close(again[0], expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="one token at a time, not 3"):
        float_model(token.repeat(1, 3), past_key_values=output.past_key_values)
    with pytest.raises(InputError, match="pixel_values came with past_key_values"):
        float_model(token, past_key_values=output.past_key_values, pixel_values=one["pixel_values"])


def test_forward_gives_the_logits_of_the_pruned_prompts(pruned_model, batch, pictures):
    groups = [pictures[:1], pictures[1:3], None]
    expected = pruned_model.model.logits(groups, QUESTIONS[:3])
    np.testing.assert_array_equal(pruned_model(**batch).logits.numpy(), expected)
    np.testing.assert_array_equal(pruned_model(**batch, logits_to_keep=2).logits.numpy(), expected[:, -2:])
    np.testing.assert_array_equal(
        pruned_model(**batch, keep=0.7).logits, pruned_model.model.logits(groups, QUESTIONS[:3], keep=0.7)
    )


def test_half_precision_inputs(pruned_model, one):
    expected = pruned_model.generate(**one.to(torch.bfloat16).to(torch.float32), max_new_tokens=4)
    assert torch.equal(pruned_model.generate(**one.to(torch.bfloat16), max_new_tokens=4), expected)


def test_pipeline(pruned_model, processor, pictures):
    pipe = transformers_pipeline("image-text-to-text", model=pruned_model, processor=processor)
    expected = pruned_model.model.generate(pictures[:2], QUESTIONS[0], max_new_tokens=6)
    content = [{"type": "image", "image": picture} for picture in pictures[:2]]
    content.append({"type": "text", "text": QUESTIONS[0]})
    (reply,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    assert reply["generated_text"].strip() == expected
    text = chat(processor, QUESTIONS[0], 2)
    (reply,) = pipe(images=[pictures[:2]], text=[text], max_new_tokens=6)
    assert reply["generated_text"].removeprefix(text).strip() == expected
    assert "image-text-to-text" in str(pipe.task)
    assert "dtype': 'float32', 'device': 'cpu'" in repr(pipe)


def test_pipeline_knows_the_class(pruned_model, processor, caplog):
    transformers_pipeline("image-text-to-text", model=pruned_model, processor=processor)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": None}, PromptError, "no input_ids"),
        ({"past_key_values": object()}, InputError, "past_key_values cannot be continued"),
        ({"prefill_chunk_size": 5}, InputError, "one token at a time"),
        ({"keep": 0.9}, InputError, "serves 0.2 to 0.8"),
        ({"max_new_tokns": 3}, ValueError, "max_new_tokns"),
        ({"prompt_lookup_num_tokens": 2}, ValueError, "stateful"),
        ({"pixel_values": None}, PromptError, "placeholders"),
        ({"attention_mask": torch.ones(1, 3)}, PromptError, r"shape \[1, 3\]"),
    ],
)
def test_arguments_that_cannot_be_served(pruned_model, one, change, error, message):
    with pytest.raises(error, match=message):
        pruned_model.generate(**{**one, **change})


def test_an_empty_prompt(pruned_model, batch):
    batch["attention_mask"][2] = 0
    with pytest.raises(PromptError, match="prompt 3 is empty"):
        pruned_model.generate(**batch)


def test_images_that_are_unknown(pruned_model, one):
    with pytest.raises(InputError, match="audio_values is not read"):
        pruned_model(**one, audio_values=torch.zeros(1))
