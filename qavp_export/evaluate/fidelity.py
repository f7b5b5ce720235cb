"""How close an arm stays to full precision with all tokens, where nobody knows the right answers.

The reference answers greedily; every arm then reads the same prompt and that answer (teacher forcing), and at each of
its tokens the two distributions over the next token are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qavp_export.calibration.data import IMAGE_SUFFIXES
from qavp_export.engines import FloatArray
from qavp_export.errors import InputError
from qavp_export.evaluate.accuracy import Done, pictures
from qavp_export.evaluate.datasets import Item
from qavp_export.evaluate.teacher_forcing import forced_logits
from qavp_export.numerics.divergence import kl_divergence, log_probabilities
from qavp_export.runtime import Prepared, QavpModel
from qavp_export.statistics import bootstrap_interval, mean, paired_bootstrap

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fidelity:
    """How one arm follows the reference, prompt by prompt.

    Attributes:
        kl: KL divergence of the arm from the reference in nats, mean over the answer's tokens `[n]`.
        agreement: Share of the answer's tokens at which both find the same token most likely `[n]`.
    """

    kl: Floats
    agreement: Floats

    def to_dict(self, seed: int) -> dict[str, Any]:
        """Returns means over prompts with bootstrap intervals, as JSON values."""
        kl, agreement = (bootstrap_interval(values, mean, seed) for values in (self.kl, self.agreement))
        return {
            "kl": kl.estimate,
            "kl_interval_95": [kl.low, kl.high],
            "top1_agreement": agreement.estimate,
            "top1_agreement_interval_95": [agreement.low, agreement.high],
        }


@dataclass(frozen=True)
class Reference:
    """What full precision with all tokens answers, and how surely.

    Attributes:
        answers: Token ids of each answer, greedy.
        folder: Where the log probabilities at each answer's tokens are kept: a file `[len(answer), V]` for each.
    """

    answers: tuple[list[int], ...]
    folder: Path

    def log_probabilities(self, index: int) -> FloatArray:
        """Reads the log probabilities of one answer `[len(answer), V]`."""
        found: FloatArray = np.load(_file(self.folder, index))
        return found


def read_images(folder: Path, prompt: str, limit: int | None, seed: int) -> tuple[Item, ...]:
    """Returns one item for each picture of a folder, in the order of their names.

    Args:
        folder: The folder.
        prompt: What is asked of each.
        limit: Most pictures, drawn by the seed; None: all.
        seed: Seed of the draw.

    Raises:
        InputError: The folder is missing or has no pictures.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder} is not a folder; check the path")
    # macOS leaves hidden `._a.jpg` beside `a.jpg` on foreign file systems: these are no pictures.
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise InputError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}); give another folder")
    if limit is not None and limit < len(paths):
        chosen = np.random.default_rng(seed).choice(len(paths), limit, replace=False)
        paths = [paths[index] for index in sorted(chosen)]
    return tuple(Item(path.name, path, prompt, ()) for path in paths)


def answer_freely(
    model: QavpModel, items: Sequence[Item], folder: Path, batch: int, max_new_tokens: int, done: Done
) -> Reference:
    """Lets the reference answer greedily and keeps how sure it was.

    Args:
        model: Full precision with all tokens.
        items: The prompts.
        folder: Where log probabilities are kept.
        batch: Prompts at once.
        max_new_tokens: Most tokens of an answer.
        done: Called as the work goes on.
    """
    banned = model.manifest.vision_tokens.image_token_id
    answers: list[list[int]] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prepared = _prepare(model, part)
        steps = model.generate_steps(prepared, max_new_tokens=max_new_tokens)
        found: list[list[int]] = [[] for _ in part]
        for step in steps:
            for answer, token in zip(found, step, strict=True):
                if token is not None:
                    answer.append(token)
        for index, logits in enumerate(forced_logits(model, prepared, found), start=start):
            np.save(_file(folder, index), log_probabilities(logits, banned).astype(np.float32))
        answers += found
        done(len(answers))
    return Reference(tuple(answers), folder)


def follow(model: QavpModel, items: Sequence[Item], reference: Reference, batch: int, done: Done) -> Fidelity:
    """Measures how an arm follows the reference.

    Args:
        model: The arm's model.
        items: The prompts that the reference answered.
        reference: What it answered.
        batch: Prompts at once.
        done: Called as the work goes on.
    """
    banned = model.manifest.vision_tokens.image_token_id
    kl: list[float] = []
    agreement: list[float] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        answers = reference.answers[start : start + len(part)]
        for index, logits in enumerate(forced_logits(model, _prepare(model, part), answers), start=start):
            expected = reference.log_probabilities(index).astype(np.float64)
            found = log_probabilities(logits, banned)
            kl.append(float(kl_divergence(expected, found).mean()))
            agreement.append(float((expected.argmax(axis=-1) == found.argmax(axis=-1)).mean()))
        done(len(kl))
    return Fidelity(np.array(kl), np.array(agreement))


def compare_fidelity(found: Mapping[str, Fidelity], seed: int) -> list[dict[str, Any]]:
    """Compares every two arms on the same prompts, the later with the earlier, as JSON values.

    Args:
        found: Fidelity by arm name.
        seed: Seed of the intervals.
    """
    comparisons: list[dict[str, Any]] = []
    for b, a in itertools.combinations(found, 2):
        values = {
            "kl": paired_bootstrap(found[a].kl, found[b].kl, seed),
            "top1_agreement": paired_bootstrap(found[a].agreement, found[b].agreement, seed),
        }
        differences = {
            name: {"difference": interval.estimate, "interval_95": [interval.low, interval.high]}
            for name, interval in values.items()
        }
        comparisons.append({"a": a, "b": b, **differences})
    return comparisons


def _prepare(model: QavpModel, items: Sequence[Item]) -> Prepared:
    return model.prepare(pictures(items), [item.prompt for item in items])


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index}.npy"
