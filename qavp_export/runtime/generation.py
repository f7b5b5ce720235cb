"""The generation loop: prefill once, then one decoder step for each token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qavp_export.engines import Engine
from qavp_export.manifest import Manifest
from qavp_export.runtime.batching import Prepared
from qavp_export.runtime.sampling import Sampler, Sampling


def generate_tokens(
    engine: Engine, manifest: Manifest, prepared: Prepared, sampling: Sampling, max_new_tokens: int
) -> Iterator[list[int | None]]:
    """Generates token by token until every answer has ended.

    An answer ends with an end-of-sequence token, which is yielded, after `max_new_tokens`, or when prompt and
    answer fill the context. The image token is never generated: the embedding would take it for an image.

    Args:
        engine: What runs the graphs.
        manifest: The bundle's manifest.
        prepared: The batch.
        sampling: How the next token is chosen.
        max_new_tokens: Most tokens of each answer.

    Yields:
        For each step one token per prompt, None for an answer that has already ended.
    """
    decoder = manifest.decoder
    sampler = Sampler(sampling, len(prepared.input_ids), manifest.vision_tokens.image_token_id)
    mask = prepared.attention_mask
    positions = prepared.next_positions.copy()
    budgets = np.minimum(max_new_tokens, decoder.context_length - positions)
    session = engine.start(mask.shape[1] + int(budgets.max()))
    live = np.ones(len(positions), dtype=np.bool_)
    step = 0
    logits = session.prefill(
        prepared.inputs_embeds, mask, prepared.position_ids, prepared.token_type_ids, logits_to_keep=1
    )
    while True:
        tokens = sampler.choose(logits[:, -1], live)
        yield [int(token) if alive else None for token, alive in zip(tokens, live, strict=True)]
        step += 1
        live = live & ~np.isin(tokens, decoder.eos_token_ids) & (budgets > step)
        if not live.any():
            return
        # An ended answer rides along on padding, its position at rest, until the whole batch has ended.
        tokens = np.where(live, tokens, decoder.pad_token_id)
        mask = np.concatenate([mask, np.ones((len(mask), 1), dtype=np.int64)], axis=1)
        logits = session.decode(tokens[:, None], mask, positions[:, None])
        positions = positions + live
