"""The tiny LLaVA: configuration, initialisation, and a forward pass over packed questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lessons import GRID, Question
from processing import IMAGE_SIZE, PATCH_SIZE, SPECIAL, VOCAB_SIZE, Vocabulary
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VISION_WIDTH, VISION_LAYERS = 128, 5
TEXT_WIDTH, TEXT_LAYERS = 256, 3
POSITION_AMPLITUDE = 0.35
PROJECTOR_SCALE = 0.16  # starts projected tokens out at a length of about 2 (losses.NORM_TARGET)
IGNORE = -100


def build_config(vocabulary: Vocabulary) -> LlavaConfig:
    """About 3M parameters; every width of projector and decoder is a multiple of 128."""
    words = vocabulary.ids
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=512,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=2,
        projection_dim=VISION_WIDTH,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=TEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=words["<pad>"],
        bos_token_id=words["<bos>"],
        eos_token_id=words["<eos>"],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words["<image>"],
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )


def _sine_cosine(width: int) -> torch.Tensor:
    """Two-dimensional sine-cosine positions of the patches, [256, width], unit amplitude."""
    quarter = width // 4
    rate = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    wave = torch.arange(GRID)[:, None] * rate
    line = torch.cat([wave.sin(), wave.cos()], dim=1)
    rows, columns = line.repeat_interleave(GRID, 0), line.repeat(GRID, 1)
    return torch.cat([rows, columns], dim=1)


def word_table(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """The decoder's word embeddings, [VOCAB_SIZE, TEXT_WIDTH]."""
    table: torch.Tensor = model.model.language_model.embed_tokens.weight
    return table


@torch.no_grad()
def build_model(vocabulary: Vocabulary) -> LlavaForConditionalGeneration:
    """Build the model with an initialisation that a few thousand steps can work with.

    Transformers' defaults (standard deviation 0.02) leave patch positions invisible beside patch contents at
    this size. Draws from torch's global generator.
    """
    model = LlavaForConditionalGeneration(build_config(vocabulary))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "lm_head" not in name:
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("out_proj", "fc2")):  # residual outputs of the tower
                module.weight.mul_((2 * VISION_LAYERS) ** -0.5)
            if name.endswith(("o_proj", "down_proj")):  # and of the decoder
                module.weight.mul_((2 * TEXT_LAYERS) ** -0.5)
    model.model.multi_modal_projector.linear_2.weight.mul_(PROJECTOR_SCALE)
    embeddings = model.model.vision_tower.embeddings
    embeddings.class_embedding.normal_(std=POSITION_AMPLITUDE)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:] = POSITION_AMPLITUDE * _sine_cosine(VISION_WIDTH)
    words = word_table(model)
    words.normal_()
    ids = vocabulary.ids
    for singular, plural in vocabulary.plurals:  # "circles" starts out near "circle"
        words[ids[plural]] = words[ids[singular]] + 0.3 * words[ids[plural]]
    words.copy_(nn.functional.normalize(words, dim=1))
    return model


@dataclass(frozen=True)
class Packed:
    """Several questions per image in one row; L text tokens, padded.

    Attributes:
        ids: [B, L], token ids.
        segment: [B, L], 1 for the first question and so on, 0 for padding.
        position: [B, L], offset of a token within its own question.
        target: [B, L], the next token where it belongs to an answer, else `IGNORE`.
    """

    ids: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor


def pack(questions: Sequence[Sequence[Question]], vocabulary: Vocabulary, multiple: int = 16) -> Packed:
    """Pack each image's questions into one row.

    Args:
        questions: B lists of questions.
        vocabulary: ids of their words.
        multiple: rows are padded to a multiple of this, so that kernels see few shapes.
    """
    ids = vocabulary.ids
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for asked in questions:
        row: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        for index, question in enumerate(asked, start=1):
            prompt = [ids[word] for word in f"Q {question.text} A".split()]
            answer = [ids[word] for word in f"{question.answer} <eos>".split()]
            tokens = prompt + answer[:-1]
            row[0].extend(tokens)
            row[1].extend([index] * len(tokens))
            row[2].extend(range(len(tokens)))
            row[3].extend([IGNORE] * (len(prompt) - 1) + answer)
        rows.append(row)
    width = -(-max(len(row[0]) for row in rows) // multiple) * multiple
    fill = (ids["<pad>"], 0, 0, IGNORE)
    columns = [torch.tensor([row[part] + [fill[part]] * (width - len(row[part])) for row in rows]) for part in range(4)]
    return Packed(columns[0], columns[1], columns[2], columns[3])


@dataclass(frozen=True)
class Vision:
    """Output of tower and projector.

    Attributes:
        tokens: [B, 256, 256], projected tokens.
        feature_cls: [B, 128], [CLS] of the layer that feeds the projector.
        pooled: [B, 128], [CLS] of the last layer, normalized.
    """

    tokens: torch.Tensor
    feature_cls: torch.Tensor
    pooled: torch.Tensor


def see(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> Vision:
    """Run tower and projector on pixels [B, 3, 128, 128]."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    features = output.hidden_states[model.config.vision_feature_layer]
    return Vision(model.model.multi_modal_projector(features[:, 1:]), features[:, 0], output.pooler_output)


def answer_logits(
    model: LlavaForConditionalGeneration, tokens: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score answer tokens; a question attends to the image and to itself, as if it were alone.

    Args:
        model: the model.
        tokens: [B, k, 256], projected tokens (all, or those kept).
        packed: the questions.

    Returns:
        Logits [n, VOCAB_SIZE] and targets [n] of the n answer tokens.
    """
    batch, kept = tokens.shape[:2]
    embed = model.get_input_embeddings()
    start = embed(torch.full((batch, 1), SPECIAL.index("<bos>")))
    inputs = torch.cat([start, tokens.to(start.dtype), embed(packed.ids)], dim=1)
    prefix = torch.arange(kept + 1)
    position = torch.cat([prefix.expand(batch, -1), packed.position + kept + 1], dim=1)
    segment = nn.functional.pad(packed.segment, (kept + 1, 0))
    length = inputs.shape[1]
    in_prefix = torch.arange(length) <= kept
    same = segment[:, :, None] == segment[:, None, :]
    visible = (same | in_prefix) & torch.ones(length, length, dtype=torch.bool).tril()
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask=visible[:, None], position_ids=position, use_cache=False
    ).last_hidden_state[:, kept + 1 :]
    chosen = packed.target != IGNORE
    return model.lm_head(hidden[chosen]), packed.target[chosen]
