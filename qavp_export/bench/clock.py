"""An engine that takes the time of what it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from qavp_export.engines import DecoderSession, Engine, FloatArray, IntArray

VISION, EMBEDDING, PREFILL, DECODE = "vision_encoder", "embedding", "prefill", "decode"

# Seconds of each call, by stage.
Calls = dict[str, list[float]]


class TimedEngine:
    """An engine; the calls that a thread makes are kept for that thread alone.

    A call begins and ends with arrays in host memory: what an engine copies to and from a GPU is inside.

    Attributes:
        shown: What the vision encoder was last given.
    """

    def __init__(self, engine: Engine) -> None:
        """Wraps an engine."""
        self._engine = engine
        self._local = threading.local()
        self.shown: Mapping[str, FloatArray | IntArray] = {}

    def begin(self) -> Calls:
        """Starts a record for this thread and returns it; it fills as calls are made."""
        calls: Calls = {VISION: [], EMBEDDING: [], PREFILL: [], DECODE: []}
        self._local.calls = calls
        return calls

    def encode_images(self, inputs: Mapping[str, FloatArray | IntArray]) -> tuple[FloatArray, IntArray]:
        """See `Encoders.encode_images`."""
        self.shown = inputs
        started = time.perf_counter()
        encoded = self._engine.encode_images(inputs)
        self._local.calls[VISION].append(time.perf_counter() - started)
        return encoded

    def embed(self, input_ids: IntArray, image_features: FloatArray) -> FloatArray:
        """See `Encoders.embed`."""
        started = time.perf_counter()
        embeds = self._engine.embed(input_ids, image_features)
        self._local.calls[EMBEDDING].append(time.perf_counter() - started)
        return embeds

    def start(self, capacity: int = 0) -> TimedSession:
        """See `Engine.start`; memory that it sets aside counts as prefill."""
        started = time.perf_counter()
        session = self._engine.start(capacity)
        return TimedSession(session, self._local.calls, time.perf_counter() - started)


class TimedSession:
    """A generation whose calls are timed. See `DecoderSession`."""

    def __init__(self, session: DecoderSession, calls: Calls, started: float) -> None:
        """Wraps a session; `started` is how long it took to start, in seconds."""
        self._session = session
        self._calls = calls
        self._started = started

    def prefill(
        self,
        inputs_embeds: FloatArray,
        attention_mask: IntArray,
        position_ids: IntArray,
        token_type_ids: IntArray | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> FloatArray:
        """See `DecoderSession.prefill`."""
        started = time.perf_counter()
        logits = self._session.prefill(
            inputs_embeds, attention_mask, position_ids, token_type_ids, logits_to_keep=logits_to_keep
        )
        self._calls[PREFILL].append(time.perf_counter() - started + self._started)
        return logits

    def decode(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        """See `DecoderSession.decode`."""
        started = time.perf_counter()
        logits = self._session.decode(input_ids, attention_mask, position_ids)
        self._calls[DECODE].append(time.perf_counter() - started)
        return logits

    def reorder(self, rows: IntArray) -> None:
        """See `DecoderSession.reorder`."""
        self._session.reorder(rows)
