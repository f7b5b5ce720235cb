"""Measure a checkpoint on held-out questions, by free-running greedy generation; exit code 1 below the gate.

python examples/shapes_vqa/evaluate.py examples/shapes_vqa/model --questions 2000 --json report.json
python examples/shapes_vqa/evaluate.py /tmp/easy-vqa --task easy-vqa --questions 9673
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lessons import Item
from model import see
from processing import to_pixels
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tasks import TASKS, Task
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

MAX_NORM_RATIO = 2.0
NORM_IMAGES = 256


@dataclass(frozen=True)
class TypeReport:
    """Figures of one question type, 0 to 1 unless said otherwise.

    Attributes:
        questions: how many were asked.
        accuracy: exact match.
        wrong_image: exact match when every question sees another question's picture.
        prior: share of the commonest answer.
        gate: accuracy required.
    """

    questions: int
    accuracy: float
    wrong_image: float
    prior: float
    gate: float


@dataclass(frozen=True)
class Report:
    """Figures of a checkpoint.

    Attributes:
        types: figures per question type.
        accuracy: exact match over all questions.
        foreground: mean length of projected foreground tokens.
        background: mean length of projected background tokens.
        norm_ratio: the larger length by the smaller.
        passed: whether every gate is met.
    """

    types: dict[str, TypeReport]
    accuracy: float
    foreground: float
    background: float
    norm_ratio: float
    passed: bool


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load model (float32) and processor from a checkpoint folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(f"{folder} holds a {type(model).__name__}, not a LLaVA")
    model.train(False)
    processor: LlavaProcessor = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    return model, processor


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: Sequence[Item],
    pictures: Sequence[Item],
    batch: int,
) -> Iterator[str]:
    """Answer questions greedily.

    Args:
        model: the model.
        processor: its processor; prompts come from its chat template.
        items: where the questions come from.
        pictures: where the pictures come from, as many.
        batch: questions per forward pass.

    Yields:
        The decoded answers, in order.
    """
    # Transformers' annotations do not cover messages with parts, nor models as generators.
    template: Callable[..., str] = processor.apply_chat_template
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[misc, assignment]
    for start in range(0, len(items), batch):
        stop = start + batch
        prompts = []
        for item in items[start:stop]:
            content = [{"type": "image"}, {"type": "text", "text": item.question.text}]
            message = [{"role": "user", "content": content}]
            prompts.append(template(message, add_generation_prompt=True, tokenize=False))
        images = [item.image for item in pictures[start:stop]]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = generate(**inputs, do_sample=False, max_new_tokens=4)
        new = output[:, inputs["input_ids"].shape[1] :]
        yield from (processor.tokenizer.decode(row, skip_special_tokens=True) for row in new)


def token_lengths(model: LlavaForConditionalGeneration, items: Sequence[Item]) -> tuple[float, float]:
    """Mean length of projected foreground and background tokens over the items' pictures."""
    lengths, shown = [], []
    for item in items:
        with torch.inference_mode():
            tokens = see(model, to_pixels(torch.from_numpy(item.image[None]))).tokens
        lengths.append(tokens[0].norm(dim=1))
        shown.append(torch.from_numpy(item.foreground))
    length, mask = torch.cat(lengths), torch.cat(shown)
    return float(length[mask].mean()), float(length[~mask].mean())


def evaluate(folder: Path, task: Task, items: Sequence[Item], batch: int, console: Console) -> Report:
    """Measure a checkpoint.

    Args:
        folder: checkpoint.
        task: what it was trained on.
        items: held-out questions, types in rotation.
        batch: questions per forward pass.
        console: where progress is shown.

    Raises:
        ValueError: the checkpoint has other words than the task.
    """
    model, processor = load(folder)
    if processor.tokenizer.get_vocab() != task.vocabulary.ids:
        raise ValueError(f"{folder} was trained on another task: its words differ")
    shift = len(task.types)  # a wrong picture still suits the question's type
    rolled = [*items[shift:], *items[:shift]]
    asked: Counter[str] = Counter(item.question.type for item in items)
    right: Counter[str] = Counter()
    blind: Counter[str] = Counter()
    for name, pictures, count in (("right picture", items, right), ("wrong picture", rolled, blind)):
        said = answers(model, processor, items, pictures, batch)
        for item, answer in zip(items, track(said, name, len(items), console=console), strict=True):
            count[item.question.type] += answer == item.question.answer
    types: dict[str, TypeReport] = {}
    for kind in filter(asked.get, task.types):
        truths = Counter(item.question.answer for item in items if item.question.type == kind)
        n = asked[kind]
        prior = truths.most_common(1)[0][1] / n
        types[kind] = TypeReport(n, right[kind] / n, blind[kind] / n, prior, task.gate[kind])
    foreground, background = token_lengths(model, items[:NORM_IMAGES])
    ratio = max(foreground, background) / min(foreground, background)
    passed = ratio < MAX_NORM_RATIO and all(row.accuracy >= row.gate for row in types.values())
    return Report(types, right.total() / len(items), foreground, background, ratio, passed)


def table(report: Report) -> Table:
    """Lay the report out for the terminal."""
    result = Table(title="Held-out questions, exact match in %")
    for name in ("type", "questions", "accuracy", "wrong image", "prior", "gate", ""):
        result.add_column(name, justify="left" if name == "type" else "right")
    for kind, row in report.types.items():
        values = (row.accuracy, row.wrong_image, row.prior, row.gate)
        verdict = "ok" if row.accuracy >= row.gate else "FAIL"
        result.add_row(kind, str(row.questions), *(f"{100 * value:.1f}" for value in values), verdict)
    result.caption = (
        f"all questions {100 * report.accuracy:.1f}; "
        f"mean token length: foreground {report.foreground:.2f}, background {report.background:.2f}, "
        f"ratio {report.norm_ratio:.2f} (gate: below {MAX_NORM_RATIO:g})"
    )
    return result


def main() -> None:
    """Command line: measure, print the table last, exit 1 below the gate."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint on held-out questions.")
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--task", choices=TASKS, default="shapes", help="what it was trained on")
    parser.add_argument("--questions", type=int, default=2000, help="questions in all, over all types")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the questions drawn")
    parser.add_argument("--batch", type=int, default=50, help="questions per forward pass")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    task = TASKS[args.task]
    if args.questions < len(task.types) or args.batch < 1:
        parser.error(f"--questions must be at least {len(task.types)}, --batch at least 1")
    console = Console()
    report = evaluate(args.model, task, task.heldout(args.questions, args.seed), args.batch, console)
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    console.print(table(report))
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
