"""Train the demo model from nothing: a tiny LLaVA that answers questions about shapes.

    python examples/shapes_vqa/train.py --out /tmp/model --seed 0
    python examples/shapes_vqa/train.py --task easy-vqa --out /tmp/easy-vqa --seed 0

Stages are counted in steps, so that a run depends on its seed and not on the machine's speed:

- align: tower and projector alone; every projected token must name what its patch shows.
- lookup: the decoder joins, on a part of the tokens (all object patches among them), which makes steps cheap.
- full: everything, on all 256 tokens in every step, so that the result is not hardened against pruning.
- again: the same once more, for easy-VQA.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from curves import History, Point, plot
from lessons import Labels, Lesson, Question
from losses import SceneHead, dense_loss, norm_loss
from model import IGNORE, VISION_WIDTH, Vision, answer_logits, build_model, pack, see, word_table
from processing import Vocabulary, build_processor, to_pixels
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tasks import QUESTIONS, TASKS, Stage, Task
from torch import nn
from transformers import GenerationConfig, LlavaForConditionalGeneration

# Steps between measurements. Fixed: a measurement in the lookup stage draws from the generator that training uses.
EVAL_EVERY = 100
# Freed buffers go back to the system after every step unless told otherwise; keeping them saves time.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**30),
}


class Trainer:
    """Model, auxiliary heads and the record of a run."""

    def __init__(self, task: Task, seed: int, console: Console) -> None:
        """Build model and heads.

        Args:
            task: what is learnt.
            seed: seeds initialisation, data and token subsets.
            console: where measurements are printed.
        """
        torch.manual_seed(seed)
        self.task = task
        self.seed = seed
        self.console = console
        self.model = build_model(task.vocabulary)
        self.heads = nn.ModuleList([SceneHead(VISION_WIDTH, task.cells, task.classes) for _ in range(2)])
        self.history = History()
        self.dev = task.development()

    def loss(self, stage: Stage, lesson: Lesson) -> torch.Tensor:
        """Weighted sum of a stage's losses for one batch."""
        words, labels = self.task.vocabulary, lesson.labels
        with torch.autocast("cpu", torch.bfloat16):
            vision = see(self.model, to_pixels(torch.from_numpy(lesson.images)))
            dense, _ = dense_loss(vision.tokens, word_table(self.model), labels, words)
            length = norm_loss(vision.tokens)
            scene: torch.Tensor = self.heads[0](vision.feature_cls, labels.scene)
            scene = scene + self.heads[1](vision.pooled, labels.scene)
            if not stage.decoder:
                return dense + length + 0.3 * scene
            tokens = keep_tokens(vision, labels, stage.keep)
            logits, target = answer_logits(self.model, tokens, pack(lesson.questions, words))
            language = nn.functional.cross_entropy(logits.float(), target)
            return language + 0.5 * dense + 0.5 * length + 0.05 * scene

    def run(self, stage: Stage, index: int, progress: Progress) -> None:
        """Train one stage."""
        seed = self.seed * len(self.task.schedule) + index
        torch.manual_seed(seed)
        stream = self.task.train(seed)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, stage.rate, (0.9, 0.98), weight_decay=0.01, fused=True)
        done = self.history.points[-1].step if self.history.points else 0
        started, losses = time.perf_counter(), []
        bar = progress.add_task(stage.name, total=stage.steps)
        for step in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * rate_factor(step, stage.steps, stage.final)
            loss = self.loss(stage, stream.lesson(stage.batch, QUESTIONS))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress.advance(bar)
            if (step + 1) % EVAL_EVERY == 0 or step + 1 == stage.steps:
                self.measure(stage, done + step + 1, sum(losses) / len(losses))
                losses.clear()
        self.history.seconds[stage.name] = round(time.perf_counter() - started, 1)

    @torch.no_grad()
    def measure(self, stage: Stage, step: int, loss: float) -> None:
        """Measure on the development pictures, record and print."""
        words = self.task.vocabulary
        with torch.autocast("cpu", torch.bfloat16):
            vision = see(self.model, to_pixels(torch.from_numpy(self.dev.images)))
            _, dense = dense_loss(vision.tokens, word_table(self.model), self.dev.labels, words)
            accuracy: dict[str, float] = {}
            if stage.decoder:
                tokens = keep_tokens(vision, self.dev.labels, stage.keep)
                right = packed_accuracy(self.model, tokens, self.dev.questions, words)
                accuracy = {kind: right[kind] for kind in self.task.types if kind in right}
        lengths = vision.tokens.float().norm(dim=2)
        shown = torch.from_numpy(self.dev.labels.foreground)
        foreground, background = float(lengths[shown].mean()), float(lengths[~shown].mean())
        point = Point(stage.name, step, loss, accuracy, float(dense), foreground, background)
        self.history.points.append(point)
        answers = " ".join(f"{kind} {100 * value:.1f}" for kind, value in accuracy.items())
        self.console.print(
            f"{stage.name} {step}: loss {loss:.3f}, patches {100 * point.dense:.1f}, "
            f"lengths {point.foreground:.2f}/{point.background:.2f} {answers}",
            highlight=False,
        )

    def save(self, out: Path) -> None:
        """Write the Hugging Face layout in float16, the learning curves and the record of the run."""
        out.mkdir(parents=True, exist_ok=True)
        ids = self.task.vocabulary.ids
        nn.Module.to(self.model, torch.float16)  # the wrapper that Transformers adds has no usable type
        self.model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=4,
            bos_token_id=ids["<bos>"],
            eos_token_id=ids["<eos>"],
            pad_token_id=ids["<pad>"],
        )
        self.model.save_pretrained(out)
        build_processor(self.task.vocabulary).save_pretrained(out)
        plot(self.history, out / "learning_curves.png")
        record = {
            "seed": self.seed,
            "seconds": self.history.seconds,
            "points": [asdict(point) for point in self.history.points],
        }
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def rate_factor(step: int, steps: int, final: float) -> float:
    """Learning rate as a share of the peak: linear warm-up, then half a cosine down to `final`."""
    warm_up = min(50, steps // 5 + 1)
    if step < warm_up:
        return (step + 1) / warm_up
    along = (step - warm_up) / max(1, steps - warm_up)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))


def keep_tokens(vision: Vision, labels: Labels, keep: int) -> torch.Tensor:
    """Choose `keep` tokens per image at random, object patches first, raster order kept; [B, keep, D]."""
    tokens = vision.tokens
    if keep == tokens.shape[1]:
        return tokens
    priority = torch.rand(tokens.shape[:2]) + torch.from_numpy(labels.foreground)
    index = priority.topk(keep, dim=1).indices.sort(dim=1).values
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def packed_accuracy(
    model: LlavaForConditionalGeneration,
    tokens: torch.Tensor,
    questions: Sequence[Sequence[Question]],
    vocabulary: Vocabulary,
) -> dict[str, float]:
    """Exact match per type on packed questions.

    Right at every answer token given the right ones before is the same as right in free-running greedy
    generation, so this agrees with `evaluate.py` up to the arithmetic.
    """
    packed = pack(questions, vocabulary)
    logits, target = answer_logits(model, tokens, packed)
    wrong_tokens = torch.zeros_like(packed.target)
    wrong_tokens[packed.target != IGNORE] = (logits.argmax(1) != target).long()
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for row, segments, asked in zip(wrong_tokens, packed.segment, questions, strict=True):
        wrong = set(segments[row == 1].tolist())
        for number, question in enumerate(asked, start=1):
            total[question.type] += 1
            right[question.type] += number not in wrong
    return {kind: right[kind] / total[kind] for kind in total}


def scaled_schedule(task: Task, steps: int) -> list[Stage]:
    """A task's schedule with its stages scaled to about `steps` steps in all, at least one each."""
    scale = steps / task.steps
    return [replace(stage, steps=max(1, round(stage.steps * scale))) for stage in task.schedule]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model (shapes: about 25 minutes on two idle cores).")
    parser.add_argument("--task", choices=TASKS, default="shapes", help="what to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--steps", type=int, help="steps in all; scales every stage (default: the task's own)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--stages", type=Path, help="folder for stage states; stages found there are not rerun")
    args = parser.parse_args()
    stages = len(TASKS[args.task].schedule)
    if args.steps is not None and args.steps < stages:
        parser.error(f"--steps must be at least {stages}")
    return args


def main() -> None:
    """Command line: train and save."""
    args = parse_arguments()
    if any(name not in os.environ for name in MALLOC):  # read by the C library at start, so start again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**MALLOC, **os.environ})
    torch.set_num_threads(args.threads)
    console = Console()
    task = TASKS[args.task]
    schedule = scaled_schedule(task, args.steps or task.steps)
    trainer = Trainer(task, args.seed, console)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    console.print(f"{count:,} parameters, {sum(stage.steps for stage in schedule)} steps")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for index, stage in enumerate(schedule):
            state = args.stages / f"{index}-{stage.name}.pt" if args.stages else None
            if state is not None and state.exists():
                loaded = torch.load(state, weights_only=False)
                trainer.model.load_state_dict(loaded["model"])
                trainer.heads.load_state_dict(loaded["heads"])
                trainer.history = loaded["history"]
                continue
            trainer.run(stage, index, progress)
            if state is not None:
                state.parent.mkdir(parents=True, exist_ok=True)
                parts = {"model": trainer.model.state_dict(), "heads": trainer.heads.state_dict()}
                torch.save({**parts, "history": trainer.history}, state)
    trainer.save(args.out)
    minutes = sum(trainer.history.seconds.values()) / 60
    console.print(f"saved to {args.out} after {minutes:.1f} minutes of training")


if __name__ == "__main__":
    main()
