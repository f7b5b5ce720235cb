"""Calibration prompts as the decoder reads them under several choices of image tokens; the images are encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qavp_export.calibration.data import CalibrationItem
from qavp_export.calibration.prompts import OPTIONS, naming, written
from qavp_export.engines import TOKEN_TYPES, IntArray
from qavp_export.engines.ort.encoders import OrtEmbedding
from qavp_export.errors import CalibrationError, InputError
from qavp_export.inspect.taps import Selection, TappedVision
from qavp_export.manifest import Manifest
from qavp_export.numerics.score import mix_token_score
from qavp_export.numerics.select import Select, select_tokens
from qavp_export.runtime.batching import check_context, prune_prompt
from qavp_export.runtime.layouts import Unit, choose_keep, load_layout
from qavp_export.runtime.processors import load_processor
from qavp_export.runtime.prompts import EncodedPrompt, PromptEncoder
from qavp_export.runtime.question import load_question_encoder

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ScoreWeights:
    """What a hybrid score is mixed with.

    Attributes:
        alpha: Weight of semantic relevance.
        outlier_weight: Weight of outlier intensity within the sensitivity.
    """

    alpha: float
    outlier_weight: float


@dataclass(frozen=True)
class Choices:
    """One prompt under every choice of image tokens.

    Attributes:
        feeds: The decoder's inputs without a cache, sequences of one length in each: first that with all image tokens.
        sequences: For each candidate, which sequence of which feed is its prompt; candidates may share one.
        text: Tokens behind the last image, in every sequence its last.
    """

    feeds: tuple[dict[str, Array], ...]
    sequences: tuple[tuple[int, int], ...]
    text: int


class PromptChooser:
    """Encodes prompts, with image tokens chosen by any weights.

    Args:
        bundle: The folder with both graphs, tokenizer and processor.
        manifest: What is known of the bundle.
        select: The selection rule.
        token_types: Whether the decoder takes `token_type_ids`.

    Raises:
        QavpError: The bundle lacks something.
    """

    def __init__(self, bundle: Path, manifest: Manifest, select: Select, *, token_types: bool) -> None:
        self._manifest = manifest
        self._select = select
        self._token_types = token_types
        self._vision = TappedVision(bundle, manifest, OPTIONS)
        self._embedding = OrtEmbedding(bundle, manifest, OPTIONS)
        self._layout = load_layout(manifest)
        question = load_question_encoder(bundle, manifest)
        options = self._layout.image_options
        self._encoder = PromptEncoder(load_processor(bundle), manifest.vision_tokens, options, question)

    def prepare(self, item: CalibrationItem, candidates: Sequence[ScoreWeights]) -> Choices:
        """Encodes one prompt, answer included.

        Raises:
            CalibrationError: A picture cannot be read, the prompt does not fit the context with all its image tokens,
                or no text follows the last image.
        """
        with naming(item):
            templated = self._encoder.chat_template is not None
            prompt, answer = written(item, self._encoder.image_token, templated=templated)
            encoded = self._encoder.encode(prompt, list(item.images), templated, answer)
            units = self._layout.units(encoded, choose_keep(self._manifest.vision_tokens, None))
            check_context([len(encoded.input_ids)], [units], self._manifest)
            selections = [found for inputs in self._layout.calls(units) for found in self._vision.run(inputs)]
            placeholders = np.flatnonzero(encoded.input_ids == self._manifest.vision_tokens.image_token_id)
            text = len(encoded.input_ids) - 1 - int(placeholders[-1])
            if not text:
                raise CalibrationError("no text follows its image; alpha auto compares what the decoder expects there")
            chosen = [[self._kept(found, weights) for found in selections] for weights in candidates]
        everything = [np.arange(len(found.score), dtype=np.int64) for found in selections]
        keys = [np.concatenate(kept).tobytes() for kept in chosen]
        distinct = dict(zip(keys, chosen, strict=True))
        feeds = [self._embed(encoded, units, selections, everything)]
        places: dict[bytes, tuple[int, int]] = {}
        for prompts in self._by_length(encoded, units, selections, distinct).values():
            places |= {key: (len(feeds), row) for row, (key, _) in enumerate(prompts)}
            feeds.append({name: np.concatenate([feed[name] for _, feed in prompts]) for name in prompts[0][1]})
        return Choices(tuple(feeds), tuple(places[key] for key in keys), text)

    def _kept(self, found: Selection, weights: ScoreWeights) -> IntArray:
        """Returns the tokens of a unit that are kept, as many as the graph keeps `[k]`."""
        error, outlier, semantic, features = (
            part[np.newaxis] for part in (found.error, found.outlier, found.semantic, found.features)
        )
        try:
            score = mix_token_score(
                error, outlier, semantic, alpha=weights.alpha, outlier_weight=weights.outlier_weight
            )
            kept: IntArray = select_tokens(self._select, features, score, len(found.kept))[0]
        except InputError as reason:
            raise CalibrationError(f"its image tokens cannot be scored ({reason}); use other images") from reason
        return kept

    def _by_length(
        self,
        encoded: EncodedPrompt,
        units: Sequence[Unit],
        selections: Sequence[Selection],
        distinct: Mapping[bytes, Sequence[IntArray]],
    ) -> dict[int, list[tuple[bytes, dict[str, Array]]]]:
        """Embeds a prompt under each choice; where tokens between rows go with their row, lengths differ."""
        groups: dict[int, list[tuple[bytes, dict[str, Array]]]] = {}
        for key, kept in distinct.items():
            feed = self._embed(encoded, units, selections, kept)
            groups.setdefault(feed["attention_mask"].shape[1], []).append((key, feed))
        return groups

    def _embed(
        self,
        encoded: EncodedPrompt,
        units: Sequence[Unit],
        selections: Sequence[Selection],
        kept: Sequence[IntArray],
    ) -> dict[str, Array]:
        """Returns the decoder's inputs, without a cache, batch size 1."""
        tokens = self._manifest.vision_tokens
        pruned = prune_prompt(encoded.input_ids, units, kept, tokens)
        ids = pruned.input_ids[np.newaxis]
        features = np.concatenate([found.features[chosen] for found, chosen in zip(selections, kept, strict=True)])
        feed: dict[str, Array] = {
            "inputs_embeds": self._embedding.embed(ids, features[np.newaxis]),
            "attention_mask": np.ones_like(ids),
            "position_ids": pruned.positions[np.newaxis],
        }
        if self._token_types:
            feed[TOKEN_TYPES] = (ids == tokens.image_token_id).astype(np.int64)
        return feed
