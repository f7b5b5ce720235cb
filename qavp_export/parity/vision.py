"""What the vision encoder should give: the family's own torch modules, scored and selected from by `numerics/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qavp_export.engines import FloatArray, IntArray
from qavp_export.errors import ParityError
from qavp_export.families import Family, Plan
from qavp_export.numerics.score import hybrid_token_score
from qavp_export.numerics.select import select_tokens, tokens_to_keep
from qavp_export.numerics.semantic import norm_relevance, random_relevance
from qavp_export.parity.question import QuestionReference
from qavp_export.passes.relevance import PATCH_RELEVANCE, TEXT_INPUT_IDS
from qavp_export.passes.select_gather import KEEP_TOKENS
from qavp_export.passes.semantic import ATTENTION_SCORERS
from qavp_export.settings import Settings

Arguments = Mapping[str, npt.NDArray[Any]]

# Two scores closer than this are a tie as far as float32 sums can tell.
SCORE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Selection:
    """What is selected of some units of N tokens.

    Attributes:
        kept: Kept indices `[B,k]`.
        scores: Scores `[B,N]`; zeros where nothing is pruned.
        features: Unpruned features `[B,N,D]`.
    """

    kept: IntArray
    scores: FloatArray
    features: FloatArray


class VisionReference:
    """The vision half of the reference.

    That the family's module computes what transformers computes is what the tests of the families show; here it is the
    truth for the graph, with the attention read where torch computes it.

    Args:
        model: The Hugging Face model, with eager attention; only its vision tower and projector are used.
        family: The model's family.
        plan: The model's sizes.
        settings: The recipe, with every choice made.
        question: The reference of the scorer `text`; None for other scorers.
    """

    def __init__(
        self, model: Any, family: Family, plan: Plan, settings: Settings, question: QuestionReference | None = None
    ) -> None:
        self._question = question
        encoder = family.vision_encoder(model) if question is None else family.question_encoder(model, question.clip)
        self._module = encoder.eval()
        self._config = model.config
        self._family = family
        self._plan = plan
        self._settings = settings

    def draw(self, seed: int) -> list[dict[str, npt.NDArray[Any]]]:
        """Returns the vision module's arguments by name for random images, call by call; all units have the same N."""
        rng = np.random.default_rng(seed)
        calls = self._family.random_images(self._config, self._plan, rng, pruned=self._settings.pruned)
        if self._question is None:
            return calls
        # One for each image.
        return [call | {TEXT_INPUT_IDS: self._question.draw(rng, len(next(iter(call.values()))))} for call in calls]

    def feeds(self, arguments: Arguments, selection: Selection) -> dict[str, npt.NDArray[Any]]:
        """Returns the graph's inputs for the vision module's arguments."""
        feeds = {name: value for name, value in arguments.items() if name != PATCH_RELEVANCE}
        if self._settings.pruned and self._settings.tokens_kept is None:
            feeds[KEEP_TOKENS] = np.array([selection.kept.shape[1]], np.int64)
        return feeds

    def select(self, arguments: Arguments) -> Selection:
        """Runs the vision module and selects from its tokens.

        Args:
            arguments: The module's arguments by name, in order.

        Raises:
            ParityError: The scorer reads an attention that the module does not show.
        """
        tensors = {name: torch.from_numpy(value) for name, value in arguments.items()}
        settings, recipe = self._settings, self._settings.recipe
        attended = settings.pruned and settings.semantic in ATTENTION_SCORERS
        compared: list[FloatArray] = []
        with nullcontext() if self._question is None else self._question.relevance(compared):
            features, relevance = self._watch(tensors) if attended else (_features(self._run(tensors)).numpy(), None)
        count = features.shape[1]
        if not settings.pruned:
            everything = np.broadcast_to(np.arange(count), features.shape[:2])
            return Selection(everything, np.zeros(features.shape[:2], np.float32), features)
        scores = hybrid_token_score(
            features,
            compared[0] if compared else self._semantic(tensors, features, relevance),
            group_size=settings.group_size,
            alpha=settings.alpha,
            score_input=recipe.score_input,
            outlier_weight=settings.outlier_weight,
        )
        kept = tokens_to_keep(count, recipe.keep) if settings.tokens_kept is None else settings.tokens_kept
        return Selection(select_tokens(recipe.select, features, scores, kept), scores, features)

    def agreement(self, selection: Selection, kept: IntArray) -> float:
        """Returns the fraction of a graph's kept indices `[B,k]` that are the reference's, ties aside.

        Of two scores that are tied, either token may be kept; a diverse choice may go on from either of two tokens that
        are tied.
        """
        select, expected, tied = self._settings.recipe.select, selection.kept, np.zeros(kept.shape, np.bool_)
        if self._settings.pruned and select == "topk":
            threshold = np.take_along_axis(selection.scores, expected, axis=1).min(axis=1, keepdims=True)
            ours = np.take_along_axis(selection.scores, kept, axis=1)
            tied = np.abs(ours - threshold) <= SCORE_TOLERANCE
        elif self._settings.pruned:
            features, scores = selection.features, selection.scores
            expected = select_tokens(select, features, scores, kept.shape[1], towards=kept)
        same = [np.isin(ours, theirs) for ours, theirs in zip(kept, expected, strict=True)]
        return float(np.mean(np.stack(same) | tied))

    def _run(self, tensors: Mapping[str, Tensor]) -> Any:
        with torch.no_grad():
            return self._module(*tensors.values())

    def _semantic(self, tensors: Mapping[str, Tensor], features: FloatArray, patches: Tensor | None) -> FloatArray:
        """Returns the scorer's relevance of every token `[B,N]`, given that of every patch if it has one."""
        if patches is None and self._settings.semantic == "norm":
            return norm_relevance(features)
        if patches is None:
            draw = random_relevance(self._settings.recipe.seed, features.shape[1])
            return np.broadcast_to(draw, features.shape[:2])
        if PATCH_RELEVANCE in tensors:
            patches = self._run({**tensors, PATCH_RELEVANCE: patches})[1]
        result: FloatArray = patches.numpy()
        return result

    def _watch(self, tensors: Mapping[str, Tensor]) -> tuple[FloatArray, Tensor]:
        """Returns the features, and the relevance of every patch `[T,P]` by the last attention that they come from.

        Towers run layers whose outputs nothing reads. Which those are, autograd's graph tells; nothing is kept for a
        backward pass.
        """
        patches = tensors[PATCH_RELEVANCE].shape[1] if PATCH_RELEVANCE in tensors else self._plan.vision_tokens
        if patches is None:
            # Tokens are the patches, and as many as the image makes.
            patches = _features(self._run(tensors)).shape[1]
        seen: list[tuple[Any, Tensor]] = []
        with self._attentions(seen, patches), _without_saved_tensors(), torch.enable_grad():
            pixels, *rest = tensors.values()
            features = _features(self._module(pixels.clone().requires_grad_(), *rest))
        behind = _ancestors(features.grad_fn)
        used = [relevance for node, relevance in seen if node in behind]
        if not used:
            raise ParityError(
                f"no attention of {patches} patches was seen in the vision tower of family "
                f"{self._family.model_type}, so scorer {self._settings.semantic!r} cannot be compared; use 'norm'"
            )
        return features.detach().numpy(), used[-1]

    @contextmanager
    def _attentions(self, seen: list[tuple[Any, Tensor]], patches: int) -> Iterator[None]:
        """Collects the relevance by each attention of the vision tower, with the node of autograd that made it."""

        def observe(_module: nn.Module, _inputs: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.dim() != 4 or weights.shape[2] != weights.shape[3]:
                return
            prefix = weights.shape[3] - patches
            if prefix not in (0, 1):
                return
            # cls: the one query is [CLS]; received: the queries are the patches.
            queries = slice(0, 1) if self._settings.semantic == "cls" else slice(prefix, None)
            seen.append((weights.grad_fn, weights.detach()[:, :, queries, prefix:].mean(dim=(1, 2))))

        handles = [module.register_forward_hook(observe) for module in self._module.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _features(output: Any) -> Tensor:
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


@contextmanager
def _without_saved_tensors() -> Iterator[None]:
    def refuse(_saved: None) -> Tensor:
        raise RuntimeError("the graph was recorded without values")

    with torch.autograd.graph.saved_tensors_hooks(lambda _tensor: None, refuse):
        yield


def _ancestors(node: Any) -> set[Any]:
    """Returns the nodes of autograd's graph that a node depends on, itself included."""
    seen: set[Any] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current is not None and current not in seen:
            seen.add(current)
            pending.extend(parent for parent, _ in current.next_functions)
    return seen
