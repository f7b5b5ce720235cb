"""Runs generations on an opened engine and compares their logits."""

from __future__ import annotations

import numpy as np

from qavp_export.engines import Engine
from qavp_export.runtime.batching import Prepared
from tests.engines.lowered import Array


def check_close(actual: Array, expected: Array, tolerance: float) -> None:
    """Fails where logits differ by more than a share of the largest."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def run_all(engine: Engine, prompt: Prepared, steps: Array, capacity: int = 0) -> list[Array]:
    """Runs a prompt, and tokens behind it `[B,steps]`; returns the logits behind each."""
    session, mask, positions = engine.start(capacity), prompt.attention_mask, prompt.next_positions[:, None]
    logits = [session.prefill(prompt.inputs_embeds, mask, prompt.position_ids, logits_to_keep=1)]
    for number, token in enumerate(steps.T):
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        logits.append(session.decode(token[:, None], mask, positions + number))
    return logits
