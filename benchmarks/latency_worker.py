"""One contestant of cpu_latency.py in a process of its own: our engine, or plain ONNX Runtime on canonical graphs."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]
from latency_graph import LAST_LOGITS
from latency_probe import measure, resident

from qavp_export.engines import DecoderSession, Engine, EngineOptions, load_engine
from qavp_export.errors import QavpError
from qavp_export.manifest import Manifest

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Lengths of context whose time per token is compared, and over how many tokens.
CONTEXTS = (100, 2000)
_TOKENS = 24
_SEED = 0


class Prompt:
    """A picture's pixels and the ids of a prompt with its placeholders first; both random.

    Args:
        manifest: Of the bundle, which says how many tokens an image has.
        text: Tokens of text.
    """

    def __init__(self, manifest: Manifest, text: int) -> None:
        rng = np.random.default_rng(_SEED)
        pixels = next(spec for spec in manifest.components["vision_encoder"].inputs if spec.name == "pixel_values")
        sizes = [size for size in pixels.shape if isinstance(size, int)]
        self.pixels: Float32 = rng.standard_normal((1, *sizes), np.float32)
        tokens = manifest.vision_tokens
        if tokens.after is None:
            raise QavpError("the bundle's number of vision tokens is not fixed; export it with one --keep")
        words = rng.integers(0, manifest.decoder.vocab_size - 1, text)
        words += words >= tokens.image_token_id
        self.ids: Int64 = np.concatenate([np.full(tokens.after, tokens.image_token_id), words])[None].astype(np.int64)

    def __len__(self) -> int:
        return int(self.ids.shape[1])


class Ours:
    """One of our engines.

    Args:
        engine: Its name.
        bundle: The bundle's folder.
        prompt: What it is asked.
        answer: Most tokens after it.
        options: How it opens the bundle.
    """

    def __init__(self, engine: str, bundle: Path, prompt: Prompt, answer: int, options: EngineOptions) -> None:
        manifest = Manifest.read(bundle)
        self._engine: Engine = load_engine(engine, bundle, manifest, options)
        self._width = manifest.decoder.hidden_size
        self._prompt = prompt
        self._capacity = len(prompt) + answer
        self._session: DecoderSession
        self._length = 0

    def first_token(self) -> tuple[int, dict[str, float]]:
        """See `latency_probe.Contestant`."""
        ends: dict[str, float] = {}
        features, _ = self._engine.encode_images({"pixel_values": self._prompt.pixels})
        ends["vision"] = time.perf_counter()
        embeds = self._engine.embed(self._prompt.ids, features)
        ends["embed"] = time.perf_counter()
        self._length = length = len(self._prompt)
        self._session = self._engine.start(self._capacity)
        logits = self._session.prefill(embeds, _mask(length), np.arange(length)[None], logits_to_keep=1)
        token = _most_likely(logits)
        ends["prefill"] = time.perf_counter()
        return token, ends

    def next_token(self, token: int) -> int:
        """See `latency_probe.Contestant`."""
        position, self._length = self._length, self._length + 1
        return _most_likely(self._session.decode(np.array([[token]]), _mask(self._length), np.array([[position]])))

    def details(self) -> dict[str, Any]:
        """Returns the time per token at different lengths of context, in seconds."""
        return {"tpot_s_by_context": {str(context): self._time_per_token(context) for context in CONTEXTS}}

    def _time_per_token(self, context: int) -> float:
        """Runs a random prompt and returns the median over the tokens that follow."""
        embeds = np.random.default_rng(_SEED).standard_normal((1, context, self._width), np.float32)
        self._length = context
        self._session = self._engine.start(context + _TOKENS)
        logits = self._session.prefill(embeds, _mask(context), np.arange(context)[None], logits_to_keep=1)
        token, times = _most_likely(logits), []
        for _ in range(_TOKENS):
            started = time.perf_counter()
            token = self.next_token(token)
            times.append(time.perf_counter() - started)
        return statistics.median(times)


class PlainOrt:
    """The canonical graphs, with all optimizations of ONNX Runtime and none of ours; logits of the last token alone.

    Args:
        bundle: The bundle's folder, with `latency_graph.LAST_LOGITS` in it.
        prompt: What it is asked.
        threads: Threads inside one operator.
        config: Entries of ONNX Runtime's session configuration.
        profile: Folder for the profile of the first runs.
    """

    def __init__(self, bundle: Path, prompt: Prompt, threads: int, config: Mapping[str, str], profile: Path) -> None:
        self._prompt = prompt
        self._vision = ort.InferenceSession(bundle / "vision_encoder" / "model.onnx", _options(threads, config))
        # A Gather needs no threads, and those of one session spin while the next session computes.
        self._embedding = ort.InferenceSession(bundle / "embedding" / "model.onnx", _options(1, config))
        options = _options(threads, config)
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "decoder")
        self._decoder = ort.InferenceSession(bundle / LAST_LOGITS, options)
        inputs = {value.name: value.shape for value in self._decoder.get_inputs()}
        past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in past)]
        self._past = list(past)
        empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
        self._empty = {name: _value(array) for name, array in empty.items()}
        self._no_image = _value(np.zeros((0, 1, inputs["inputs_embeds"][2]), np.float32))
        self._cache = self._empty
        self._length = 0

    def first_token(self) -> tuple[int, dict[str, float]]:
        """See `latency_probe.Contestant`."""
        ends: dict[str, float] = {}
        pixels = {"pixel_values": _value(self._prompt.pixels)}
        (features,) = self._vision.run_with_ort_values(["image_features"], pixels)
        ends["vision"] = time.perf_counter()
        embeds = self._embed(self._prompt.ids, features)
        ends["embed"] = time.perf_counter()
        self._cache, self._length = self._empty, 0
        token = self._step(embeds)
        ends["prefill"] = time.perf_counter()
        return token, ends

    def next_token(self, token: int) -> int:
        """See `latency_probe.Contestant`."""
        return self._step(self._embed(np.array([[token]]), self._no_image))

    def details(self) -> dict[str, Any]:
        """Runs one token, and returns how many nodes of each operator the decoder had; ends the profile."""
        self._cache, self._length = self._empty, 0
        self.next_token(1)
        path = Path(self._decoder.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        nodes = {event["name"]: event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
        operators = sorted(nodes.values())
        return {"decoder_operators": {name: operators.count(name) for name in dict.fromkeys(operators)}}

    def _embed(self, ids: Int64, features: ort.OrtValue) -> ort.OrtValue:
        inputs = {"input_ids": _value(ids), "image_features": features}
        return self._embedding.run_with_ort_values(["inputs_embeds"], inputs)[0]

    def _step(self, embeds: ort.OrtValue) -> int:
        start, self._length = self._length, self._length + embeds.shape()[1]
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": _value(_mask(self._length)),
            "position_ids": _value(np.arange(start, self._length)[None]),
            **self._cache,
        }
        logits, *present = self._decoder.run_with_ort_values(self._outputs, inputs)
        self._cache = dict(zip(self._past, present, strict=True))
        return _most_likely(logits.numpy())


class _Worker(Protocol):
    def first_token(self) -> tuple[int, dict[str, float]]: ...

    def next_token(self, token: int) -> int: ...

    def details(self) -> dict[str, Any]: ...


def main(task: Mapping[str, Any]) -> None:
    """Loads and measures; prints one JSON object."""
    bundle = Path(task["bundle"])
    prompt = Prompt(Manifest.read(bundle), task["text"])
    with tempfile.TemporaryDirectory(prefix="latency-") as profile:
        started = time.perf_counter()
        contestant: _Worker
        if task["engine"]:
            options = EngineOptions(threads=task["threads"], kv_cache=task["kv_cache"])
            contestant = Ours(task["engine"], bundle, prompt, task["tokens"] + 1, options)
        else:
            contestant = PlainOrt(bundle, prompt, task["threads"], task["config"], Path(profile))
        load = time.perf_counter() - started
        loaded = resident()
        details = {"prompt_tokens": len(prompt), **contestant.details()}
    timings = measure(contestant, task["repeats"], task["seconds"], task["tokens"])
    print(json.dumps({"load_s": load, "timings": timings, "resident_after_load": loaded, "details": details}))


def _options(threads: int, config: Mapping[str, str]) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


def _mask(length: int) -> Int64:
    return np.ones((1, length), np.int64)


def _most_likely(logits: Float32) -> int:
    return int(logits[0, -1].argmax())


def _value(array: Float32 | Int64) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
