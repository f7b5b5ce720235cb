"""Vocabularies, tokenizer, chat template and image processor of the demo model."""

from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Punctuation, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

IMAGE_SIZE, PATCH_SIZE = 128, 8
IMAGE_MEAN, IMAGE_STD = 0.5, 0.27
VOCAB_SIZE = 64

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")  # a token's place is its id, in every vocabulary
MARKERS = ("Q", "A")  # matched before lower-casing, so that the article "a" stays another word
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
  {%- set parts = message['content'] %}
  {%- if parts is string %}
    {%- set parts = [{'type': 'text', 'text': parts}] %}
  {%- endif %}
  {%- for part in parts if part['type'] == 'image' %}
    {{- ' <image>' }}
  {%- endfor %}
  {{- ' A' if message['role'] == 'assistant' else ' Q' }}
  {%- for part in parts if part['type'] == 'text' %}
    {{- ' ' + part['text'] }}
  {%- endfor %}
  {%- if message['role'] == 'assistant' %}
    {{- ' ' + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- ' A' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Vocabulary:
    """The words of a task. Every task has the same number of tokens, so that models differ in nothing else.

    Attributes:
        words: at most 57 words, in the order of their ids.
        plurals: pairs of a word and its plural, which training starts near each other.
    """

    words: tuple[str, ...]
    plurals: tuple[tuple[str, str], ...] = ()

    @cached_property
    def ids(self) -> dict[str, int]:
        """Word to id: special tokens, markers, words, then unused entries up to `VOCAB_SIZE`."""
        words = (*SPECIAL, *MARKERS, *self.words)
        spare = tuple(f"<unused{index}>" for index in range(VOCAB_SIZE - len(words)))
        return {word: index for index, word in enumerate((*words, *spare))}


def build_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Word-level tokenizer that also takes capitals, British spelling and punctuation without spaces."""
    tokenizer = Tokenizer(WordLevel(vocabulary.ids, unk_token="<unk>"))
    tokenizer.normalizer = Normalizers([Lowercase(), Replace("colour", "color")])
    tokenizer.pre_tokenizer = PreTokenizers([WhitespaceSplit(), Punctuation("isolated")])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, single_word=True) for token in MARKERS]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(vocabulary: Vocabulary) -> LlavaProcessor:
    """LLaVA processor: shorter edge to 128 pixels, centre crop, 256 image tokens."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=image_processor,
        tokenizer=build_tokenizer(vocabulary),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS], which the "default" strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Do what the image processor does to a picture that has the right size already.

    Args:
        images: [B, 128, 128, 3], uint8.

    Returns:
        [B, 3, 128, 128], float32, normalized.
    """
    return ((images.permute(0, 3, 1, 2).float() / 255 - IMAGE_MEAN) / IMAGE_STD).contiguous()
