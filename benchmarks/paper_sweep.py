"""The cells of the paper's table, and the questions that each of them is asked.

A checkpoint is exported once for each regime. Tokens are scored and selected here, by the reference numerics, from what
the canonical vision encoder yields before it selects; the regime's decoder answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from paper_regimes import REGIMES, SharedScaleEngine, open_regime

from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.errors import InputError
from qavp_export.evaluate.bundles import Bundles
from qavp_export.evaluate.datasets import DataSet, Item
from qavp_export.evaluate.metrics import METRICS
from qavp_export.inspect.taps import TappedVision
from qavp_export.manifest import Manifest
from qavp_export.numerics.rotation import residual_rotation
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import Select, select_tokens, tokens_to_keep
from qavp_export.pipeline import Progress
from qavp_export.runtime import QavpModel
from qavp_export.runtime.batching import Prepared, prune_prompt
from qavp_export.runtime.layouts import Unit, load_layout
from qavp_export.runtime.preparation import embed_pruned
from qavp_export.runtime.processors import load_processor
from qavp_export.runtime.prompts import PromptEncoder

Score: TypeAlias = Literal["raw", "rms", "rotated", "flat", "random"]
"""What ranks tokens: the hybrid score of features as they are, RMS-normalised or in the decoder's rotated basis; the
same for all; or chance."""

# Pictures whose features are scored or selected from at a time: float64 copies of more would not fit.
_CHUNK = 50
_RANDOM_SEEDS = 5
_OTHER_INPUTS: tuple[Score, ...] = ("rms", "rotated")
# The regimes in which selectors and controls are measured beside alpha and the score's input.
_CONTROLLED = ("full", "two-level", "static")


@dataclass(frozen=True)
class Cell:
    """One figure of the table.

    Attributes:
        regime: A name in `REGIMES`.
        select: How tokens are selected.
        score: What ranks them.
        alpha: Weight of the semantic score in a hybrid one; 1 and of no effect for others.
        keep: Share of the tokens that is kept; 1: all, whatever the rest says.
        seeds: How many draws the figure is the mean of.
    """

    regime: str
    select: Select = "topk"
    score: Score = "raw"
    alpha: float = 1.0
    keep: float = 1.0
    seeds: int = 1

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"{self.regime}/{self.select}/{self.score}/alpha {self.alpha:g}/keep {self.keep:g}"


@dataclass(frozen=True)
class Outcome:
    """What a cell scored.

    Attributes:
        scores: Score of each seed's answer to each question `[seeds, n]`.
        scales: Calibrated activation scales `[Q]`; empty where none are calibrated.
    """

    scores: npt.NDArray[np.float64]
    scales: FloatArray


def cells(regimes: Sequence[str], alphas: Sequence[float], keeps: Sequence[float]) -> list[Cell]:
    """Returns the sweep: alpha and the score's input in all regimes, selectors and controls in some."""
    found: list[Cell] = []
    for keep in keeps:
        for regime in regimes:
            found += [Cell(regime, alpha=alpha, keep=keep) for alpha in sorted({0.5, 1.0, *alphas})]
            found += [Cell(regime, score=score, alpha=0.5, keep=keep) for score in _OTHER_INPUTS]
            if regime in _CONTROLLED:
                found += [Cell(regime, "dpp", "raw", alpha, keep) for alpha in (0.5, 1.0)]
                found += [Cell(regime, "dpp", "flat", keep=keep), Cell(regime, "dpp", "random", keep=keep)]
                found.append(Cell(regime, "maxmin", "flat", keep=keep))
                found.append(Cell(regime, "topk", "random", keep=keep, seeds=_RANDOM_SEEDS))
    return found + [Cell(regime) for regime in regimes]


@dataclass(frozen=True)
class Questions:
    """Questions about one picture each, encoded and seen.

    Attributes:
        items: The questions `n`.
        ids: The unpruned prompt of each `[S]`.
        units: The picture of each.
        features: Its projected tokens `[n, N, D]`.
        semantic: Their semantic relevance as the recipe's scorer yields it `[n, N]`.
    """

    items: Sequence[Item]
    ids: Sequence[IntArray]
    units: Sequence[Unit]
    features: FloatArray
    semantic: FloatArray

    def batches(self, size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yields the questions in batches of one length each: padding would take part in shared scales."""
        lengths = np.array([len(ids) for ids in self.ids])
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            for start in range(0, len(rows), size):
                yield rows[start : start + size]


class Ranking:
    """Scores and selections of questions' tokens, each made once.

    Args:
        questions: The questions.
        group_size: The recipe's group size.
        seed: Seed of random scores and of the decoder's rotation.
    """

    def __init__(self, questions: Questions, group_size: int, seed: int) -> None:
        self._questions = questions
        self._group_size = group_size
        self._seed = seed
        self._scores: dict[tuple[Score, float, int], FloatArray] = {}
        self._kept: dict[tuple[Select, Score, float, float, int], IntArray] = {}

    def kept(self, cell: Cell, draw: int) -> IntArray:
        """Returns which tokens a cell keeps `[n, k]`, ascending.

        Args:
            cell: The cell.
            draw: Number of the draw, where the score is random.
        """
        key = (cell.select, cell.score, cell.alpha, cell.keep, draw)
        if key not in self._kept:
            features = self._questions.features
            count = features.shape[1]
            k = tokens_to_keep(count, cell.keep)
            score = self._score(cell.score, cell.alpha, draw)
            self._kept[key] = np.concatenate(
                [select_tokens(cell.select, features[part], score[part], k) for part in self._parts()]
            )
        return self._kept[key]

    def _score(self, kind: Score, alpha: float, draw: int) -> FloatArray:
        key = (kind, alpha, draw)
        if key not in self._scores:
            self._scores[key] = self._make(kind, alpha, draw)
        return self._scores[key]

    def _make(self, kind: Score, alpha: float, draw: int) -> FloatArray:
        shape = self._questions.semantic.shape
        if kind == "flat":
            return np.zeros(shape, np.float32)
        if kind == "random":
            return np.random.default_rng([self._seed, draw]).random(shape, np.float32)
        parts = []
        for part in self._parts():
            features = self._questions.features[part]
            if kind == "rotated":
                features = residual_rotation(features.shape[-1], self._seed).apply(features).astype(np.float32)
            semantic, as_given = self._questions.semantic[part], "rms" if kind == "rms" else "raw"
            parts.append(
                hybrid_token_score(features, semantic, group_size=self._group_size, alpha=alpha, score_input=as_given)
            )
        return np.concatenate(parts)

    def _parts(self) -> list[slice]:
        return [slice(start, start + _CHUNK) for start in range(0, len(self._questions.ids), _CHUNK)]


class Study:
    """One checkpoint and the questions that its cells are asked.

    Args:
        bundles: Where the checkpoint's bundles are.
        regimes: Names in `REGIMES`.
        data: The questions.
        calibration: Questions, others than `data`, whose prompts calibrate static scales.
        folder: An empty folder for graphs that are made.
        options: How graphs are opened.
        batch: Most questions at once.
        max_new_tokens: Most tokens of an answer.
        progress: Called as exports go on.

    Attributes:
        identity: Names of the bundles by regime: the same for the same checkpoint, recipes and versions.
        tokens: Vision tokens of a picture before pruning.

    Raises:
        QavpError: The checkpoint cannot be exported, or its prompts do not show one picture of a fixed size each.
    """

    def __init__(
        self,
        bundles: Bundles,
        regimes: Sequence[str],
        data: DataSet,
        calibration: Sequence[Item],
        folder: Path,
        *,
        options: EngineOptions,
        batch: int,
        max_new_tokens: int,
        progress: Progress,
    ) -> None:
        self._data, self._batch, self._max_new_tokens = data, batch, max_new_tokens
        found = {name: bundles.get(REGIMES[name].recipe(), progress) for name in regimes}
        self.identity = {name: path.name for name, path in found.items()}
        self._engines = {name: open_regime(REGIMES[name], path, folder / name, options) for name, path in found.items()}
        self._models = {name: QavpModel(path, Manifest.read(path), self._engines[name]) for name, path in found.items()}
        first = next(iter(found.values()))
        manifest = Manifest.read(first)
        group_size, seed = int(manifest.recipe["group_size"]), int(manifest.recipe["seed"])
        self._asked = look_at(first, data.items, options, batch)
        self._ranking = Ranking(self._asked, group_size, seed)
        self._calibrating = look_at(first, calibration, options, batch)
        self._calibration_ranking = Ranking(self._calibrating, group_size, seed)
        self.tokens = self._asked.features.shape[1]

    def measure(self, cell: Cell) -> Outcome:
        """Asks a cell all questions, greedily, and judges the answers."""
        judge = METRICS[self._data.metric]
        scores = []
        scales: FloatArray = np.zeros(0, np.float32)
        for draw in range(cell.seeds):
            scales = self._calibrate(cell, draw)
            answers = self.answers(cell, draw)
            scores.append([judge(answer, item) for answer, item in zip(answers, self._data.items, strict=True)])
        return Outcome(np.array(scores, np.float64), scales)

    def answers(self, cell: Cell, draw: int = 0) -> list[str]:
        """Returns a cell's answer to each question; static scales are those of the last calibration."""
        model, asked = self._models[cell.regime], self._asked
        kept = self._ranking.kept(cell, draw)
        answers = [""] * len(asked.items)
        for rows in asked.batches(self._batch):
            prepared = prepare(model, asked, rows, kept)
            for row, text in zip(rows, _generate(model, prepared, self._max_new_tokens), strict=True):
                answers[row] = text
        return answers

    def _calibrate(self, cell: Cell, draw: int) -> FloatArray:
        engine, model = self._engines[cell.regime], self._models[cell.regime]
        if not isinstance(engine, SharedScaleEngine):
            return np.zeros(0, np.float32)
        kept = self._calibration_ranking.kept(cell, draw)
        batches = self._calibrating.batches(self._batch)
        return engine.calibrate(prepare(model, self._calibrating, rows, kept) for rows in batches)


def look_at(bundle: Path, items: Sequence[Item], options: EngineOptions, batch: int) -> Questions:
    """Encodes questions and runs the canonical vision encoder on their pictures.

    Raises:
        InputError: A question does not show one picture that is one unit.
        QavpError: A picture or prompt cannot be encoded.
    """
    manifest = Manifest.read(bundle)
    layout, vision = load_layout(manifest), TappedVision(bundle, manifest, options)
    encoder = PromptEncoder(load_processor(bundle), manifest.vision_tokens, layout.image_options)
    ids, units, selections = [], [], []
    for item in items:
        encoded = encoder.encode(item.prompt, [] if item.image is None else [item.image], True)
        shown = layout.units(encoded, manifest.vision_tokens.keep)
        if len(shown) != 1:
            raise InputError(f"question {item.id} shows {len(shown)} pictures or tiles; this table is for one")
        ids.append(encoded.input_ids)
        units += shown
    for start in range(0, len(units), batch):
        for call in layout.calls(units[start : start + batch]):
            selections += vision.run(call)
    features = np.stack([selection.features for selection in selections])
    return Questions(items, ids, units, features, np.stack([selection.semantic for selection in selections]))


def prepare(model: QavpModel, questions: Questions, rows: npt.NDArray[np.int64], kept: IntArray) -> Prepared:
    """Returns a batch of questions as the decoder reads it.

    Args:
        model: Whose embedding is used.
        questions: The questions.
        rows: Which of them.
        kept: The tokens that are kept of every question `[n, k]`.
    """
    tokens = model.manifest.vision_tokens
    pruned = [prune_prompt(questions.ids[row], [questions.units[row]], [kept[row]], tokens) for row in rows]
    return embed_pruned(
        pruned,
        np.take_along_axis(questions.features[rows], kept[rows][..., np.newaxis], axis=1),
        model.manifest,
        model.engine,
        kept_indices=tuple(kept[rows]),
        unpruned_tokens=(questions.features.shape[1],) * len(rows),
        images_per_prompt=(1,) * len(rows),
    )


def _generate(model: QavpModel, prepared: Prepared, max_new_tokens: int) -> list[str]:
    streams = [model.text_stream() for _ in prepared.images_per_prompt]
    texts = [""] * len(streams)
    for step in model.generate_steps(prepared, None, max_new_tokens):
        for row, token in enumerate(step):
            if token is not None:
                texts[row] += streams[row].push(token)
    return [(text + stream.finish()).strip() for text, stream in zip(texts, streams, strict=True)]
