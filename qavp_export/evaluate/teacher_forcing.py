"""What a model expects at each token of an answer that is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qavp_export.engines import FloatArray
from qavp_export.runtime import Prepared, QavpModel


def forced_logits(model: QavpModel, prepared: Prepared, answers: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Runs prompts followed by given answers, and returns what the model expected at each token of the answers.

    Answers are read token by token, as they are generated: one pass over prompt and answer would be another thing where
    a prompt's tokens see one another (PaliGemma).

    Args:
        model: The model.
        prepared: The prompts, as the model prepared them.
        answers: Token ids of the answer to each, at least one; none of them an image placeholder.

    Returns:
        For each prompt the logits from which its answer's tokens would be chosen `[len(answer), V]`.
    """
    counts = np.array([len(answer) for answer in answers])
    longest = int(counts.max())
    ids = np.full((len(answers), longest), model.manifest.decoder.pad_token_id, np.int64)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = answer
    mask, positions = prepared.attention_mask, prepared.next_positions.copy()
    session = model.engine.start(mask.shape[1] + longest)
    steps = [
        session.prefill(prepared.inputs_embeds, mask, prepared.position_ids, prepared.token_type_ids, logits_to_keep=1)[
            :, -1
        ]
    ]
    for step in range(longest - 1):
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        steps.append(session.decode(ids[:, step : step + 1], mask, positions[:, None])[:, -1])
        # As in generation: an answer that has ended rides along on padding, its position at rest.
        positions = positions + (counts > step + 1)
    logits = np.stack(steps, axis=1)
    return [logits[row, :count] for row, count in enumerate(counts)]
