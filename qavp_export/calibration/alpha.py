"""Recipe field `alpha: auto`: chooses alpha and outlier_weight on calibration images, by fidelity.

For each image prompt the bundle's own decoder, quantized, is its own teacher: it reads the prompt with all image
tokens, and then with those that each pair of weights keeps. What pruning does to it is how far its distributions over
the next token move at the text behind the image: the question's tokens and, where the data have one, the answer's.
Nothing is generated, and no labels are needed.

Full precision with all tokens would be a teacher of pruning and rounding together. But a small machine has no room for
a second decoder, and the rounding is the same for all candidates. So there is one path: the canonical decoder, run
layer by layer over all prompts as GPTQ does, with the weights of a few layers in memory at a time; its activations are
rounded as in the engines. A lowered engine would be faster, but needs the whole decoder in memory (13 GB for 7 billion
parameters), which no other step of an export does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.calibration.choices import PromptChooser, ScoreWeights
from qavp_export.calibration.data import CalibrationItem
from qavp_export.calibration.prompts import OPTIONS, empty_cache
from qavp_export.calibration.stops import find_stops
from qavp_export.calibration.walk import Walk, open_part
from qavp_export.engines import TOKEN_TYPES
from qavp_export.engines.lowering.split import HIDDEN, split_head
from qavp_export.engines.ort.session import session_options
from qavp_export.errors import CalibrationError
from qavp_export.manifest import Manifest
from qavp_export.numerics.divergence import kl_divergence, log_probabilities
from qavp_export.numerics.score import PAPER_ALPHA, PAPER_OUTLIER_WEIGHT
from qavp_export.numerics.select import Select
from qavp_export.passes import realized_precision
from qavp_export.statistics import best_of_p

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

FIT_PROMPTS = 32
"""Most prompts that the weights are chosen on: the first of those that are drawn."""

CHANCE = 0.05
"""How often other weights than the paper's may be chosen where they are no better."""

PAPER = ScoreWeights(PAPER_ALPHA, PAPER_OUTLIER_WEIGHT)

# With alpha 1 the sensitivity does not count, so neither does its mix.
CANDIDATES = (
    *(ScoreWeights(alpha, mix) for alpha in (0.0, 0.25, 0.5, 0.75) for mix in (0.0, 0.5, 1.0)),
    ScoreWeights(1.0, PAPER_OUTLIER_WEIGHT),
)
"""What is tried."""


@dataclass(frozen=True)
class AlphaFit:
    """What was found.

    Attributes:
        kl: KL divergence of each candidate of `CANDIDATES` from the teacher in nats, mean over the tokens behind the
            image `[candidates, images]`.
        agreement: Share of those tokens at which both find the same next token most likely `[candidates, images]`.
    """

    kl: Floats
    agreement: Floats

    @property
    def chosen(self) -> ScoreWeights:
        """The candidate of the lowest mean divergence; the paper's, unless that is better beyond chance."""
        return choose(CANDIDATES, self.kl)

    def to_dict(self) -> dict[str, Any]:
        """Returns the manifest's section `alpha_fit`."""
        measured = zip(CANDIDATES, self.kl.mean(axis=1), self.agreement.mean(axis=1), strict=True)
        return {
            "images": self.kl.shape[1],
            "candidates": [
                dataclasses.asdict(weights) | {"kl": float(kl), "agreement": float(agreement)}
                for weights, kl, agreement in measured
            ],
            "chosen": dataclasses.asdict(self.chosen),
        }


def choose(candidates: Sequence[ScoreWeights], kl: Floats) -> ScoreWeights:
    """Chooses between candidates that were measured on the same images.

    The lowest mean divergence wins; of equals, the nearest to the paper's weights. But among many candidates one looks
    better by chance. So the paper's themselves stay unless chance gives the best of all candidates a lead like the
    winner's, image by image, in at most 5 of 100 cases (`best_of_p`). Fewer than 5 images never tell.

    Args:
        candidates: The candidates, the paper's weights among them.
        kl: Their divergence `[candidates, images]`.
    """
    means = kl.mean(axis=1)

    def rank(index: int) -> tuple[float, float, float, float]:
        weights = candidates[index]
        away = abs(weights.alpha - PAPER.alpha) + abs(weights.outlier_weight - PAPER.outlier_weight)
        return means[index], away, weights.alpha, weights.outlier_weight

    best = min(range(len(candidates)), key=rank)
    chance = best_of_p(kl[candidates.index(PAPER)] - kl, seed=0)[best]
    return candidates[best] if chance <= CHANCE else PAPER


def fit_alpha(
    bundle: Path,
    manifest: Manifest,
    items: Sequence[CalibrationItem],
    select: Select,
    folder: Path,
    finished: MutableMapping[str, Any],
    progress: Callable[[int, int], None],
) -> AlphaFit:
    """Measures every candidate.

    Args:
        bundle: The bundle's folder, with its three canonical graphs, their weights, tokenizer and processor.
        manifest: What is known of the bundle.
        items: The prompts.
        select: The recipe's selection rule.
        folder: A folder for what is kept on disk meanwhile: empty, or what an interrupted fit of the same bundle and
            prompts has left.
        finished: What is finished; kept for the next run if this one is interrupted.
        progress: Called with steps done and steps in all.

    Returns:
        What was found, the same for the same bundle and prompts.

    Raises:
        CalibrationError: There are no prompts, one cannot be read or does not fit the context with all its image
            tokens, or the decoder overflows on one.
    """
    if not items:
        raise CalibrationError("alpha auto has no calibration image to compare its candidates on; give some")
    if "kl" not in finished:
        body, head = split_head(ir.load(bundle / manifest.components["decoder"].file))
        stops = find_stops(body, {layer.node for layer in realized_precision(body)})
        total = len(items) + len(stops) + 1
        prompts = _Prompts(folder, finished)
        prompts.encode(bundle, manifest, items, select, lambda done: progress(done, total))
        walk = Walk(body, prompts.feeds(manifest), _subfolder(folder, "walk"))
        for number, stop in enumerate(stops):
            progress(len(items) + number, total)
            # An interrupted walk may be further.
            if not walk.passed(stop.value):
                walk.advance([stop.value])
        progress(total - 1, total)
        (hidden,) = (value for value in body.graph.outputs if value.name == HIDDEN)
        walk.advance([hidden])
        kl, agreement = _compare(walk.read(hidden), head, prompts, items, manifest.vision_tokens.image_token_id)
        finished["agreement"] = agreement.tolist()
        finished["kl"] = kl.tolist()
    return AlphaFit(np.array(finished["kl"]), np.array(finished["agreement"]))


class _Prompts:
    """The prompts under every choice of image tokens, on disk."""

    def __init__(self, folder: Path, finished: MutableMapping[str, Any]) -> None:
        self._folder = _subfolder(folder, "prompts")
        self._finished = finished
        self._count = 0

    def encode(
        self,
        bundle: Path,
        manifest: Manifest,
        items: Sequence[CalibrationItem],
        select: Select,
        progress: Callable[[int], None],
    ) -> None:
        """Encodes those that are not there yet."""
        self._count = len(items)
        rest = [number for number in range(len(items)) if f"prompt-{number}" not in self._finished]
        if not rest:
            return
        typed = any(spec.name == TOKEN_TYPES for spec in manifest.components["decoder"].inputs)
        chooser = PromptChooser(bundle, manifest, select, token_types=typed)
        for number in rest:
            progress(number)
            choices = chooser.prepare(items[number], CANDIDATES)
            for index, feed in enumerate(choices.feeds):
                for name, array in feed.items():
                    np.save(self._file(number, index, name), array)
            self._finished[f"prompt-{number}"] = {
                "feeds": [list(feed) for feed in choices.feeds],
                "sequences": choices.sequences,
                "text": choices.text,
            }

    def feeds(self, manifest: Manifest) -> list[dict[str, Array]]:
        """Returns the decoder's inputs, mapped from files, prompt by prompt."""
        found = []
        for number in range(self._count):
            for index, names in enumerate(self._finished[f"prompt-{number}"]["feeds"]):
                feed = {name: np.load(self._file(number, index, name), mmap_mode="r") for name in names}
                found.append(feed | empty_cache(manifest.decoder, len(feed["attention_mask"])))
        return found

    def layout(self, number: int) -> tuple[int, list[tuple[int, int]], int]:
        """Returns how many feeds a prompt has, each candidate's feed and sequence, and the tokens behind the image."""
        entry = self._finished[f"prompt-{number}"]
        return len(entry["feeds"]), [(feed, row) for feed, row in entry["sequences"]], int(entry["text"])

    def _file(self, number: int, index: int, name: str) -> Path:
        return self._folder / f"{number}-{index}.{name}.npy"


def _compare(
    hidden: Iterator[Array], head: ir.Model, prompts: _Prompts, items: Sequence[CalibrationItem], banned: int
) -> tuple[Floats, Floats]:
    """Compares every candidate with the teacher.

    Args:
        hidden: What the head reads `[B,S,D]`, feed by feed.
        head: The decoder's head.
        prompts: Which sequences these are.
        items: The prompts, for messages.
        banned: The image placeholder, which is never generated.

    Returns:
        KL divergence and agreement `[candidates, images]`.
    """
    session = open_part(head, session_options(OPTIONS))
    divergence, agreement = np.zeros((2, len(CANDIDATES), len(items)))
    for image, item in enumerate(items):
        feeds, sequences, text = prompts.layout(image)
        measured: dict[tuple[int, int], tuple[float, float]] = {}
        teacher: Floats | None = None
        for feed in range(feeds):
            for row, states in enumerate(next(hidden)):
                (logits,) = session.run(["logits"], {HIDDEN: states[np.newaxis, -text:]})
                if not np.isfinite(logits).all():
                    shows = ", ".join(path.name for path in item.images)
                    raise CalibrationError(
                        f"the decoder overflows on the calibration prompt about {shows}; give alpha a number"
                    )
                found = log_probabilities(logits[0], banned)
                if teacher is None:
                    teacher = found
                same = found.argmax(axis=-1) == teacher.argmax(axis=-1)
                measured[feed, row] = float(kl_divergence(teacher, found).mean()), float(same.mean())
        for candidate, place in enumerate(sequences):
            divergence[candidate, image], agreement[candidate, image] = measured[place]
    return divergence, agreement


def _subfolder(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    return path
