"""What was measured, as JSON values: percentiles by stage, ratios with intervals, and what the timings hold."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from qavp_export.bench.accuracy import Accuracy
from qavp_export.bench.comparison import Comparison, Measured, Plan
from qavp_export.bench.load import LoadRun
from qavp_export.bench.request import Sample
from qavp_export.manifest import Manifest
from qavp_export.statistics import paired_bootstrap, percentile, ratio_interval

SCORING = "scoring_and_gather"
# Names in files -> names for people.
STAGES: Mapping[str, str] = MappingProxyType(
    {
        "preprocess": "preprocess",
        "vision_encoder": "vision encoder",
        SCORING: "of it scoring, gather",
        "embedding": "embedding",
        "prefill": "prefill",
        "decode": "decode, each token",
        "other": "other",
    }
)
METRICS: Mapping[str, str] = MappingProxyType(
    {"ttft": "time to first token", "tpot": "time per output token", "end_to_end": "end to end"}
)
PERCENTILES = (50, 90, 99)

INSIDE = (
    "Each bundle and engine has a process of its own; one answers at a time, and their order changes every round. All "
    "get the same images and questions, and write answers of the same length: no token ends them earlier.",
    "preprocess: reading the image file, image processor, tokenizer, position ids. vision encoder: tower, projector, "
    "scoring and gather. prefill and decode: the decoder with its head. other: choosing tokens (greedy) and text.",
    "scoring and gather is the vision encoder as it runs less the same graph cut off at the projected tokens, both run "
    "in turn; it is part of the vision encoder's time. It is a difference of medians, with its interval.",
    "Stages begin and end with arrays in host memory: copies to and from a GPU are inside.",
    "CUDA graphs: tensorrt records one at the second token of every answer, which is inside decode, and replays it; "
    "tensorrt-rtx does so by itself; ort-cuda has none.",
    "load time: opening engine, tokenizer and processor; libraries are imported and the GPU is started before. The "
    "files may be in the system's cache.",
    "host memory: the most that the process has had, Python (without torch) and mapped files included. Memory of the "
    "GPU: the most that was in use from loading to the end of the warm-up, less what was in use before; without the "
    "CUDA context.",
    "accuracy is the bundle's, measured with the engine that is named beside it.",
    "Intervals are 95% bootstrap intervals of the ratio of medians, over rounds, both sides of a round together. A p99 "
    "of fewer than 100 samples is close to their largest.",
)

_SEED = 0
_LIBRARIES = ("qavp-export", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13", "transformers", "numpy")


def summarize(comparison: Comparison, plan: Plan, judged: Mapping[Path, Accuracy]) -> dict[str, Any]:
    """Returns everything as JSON values; times in milliseconds.

    Args:
        comparison: What was found.
        plan: What was measured.
        judged: The accuracy of bundles, where it is known.
    """
    baseline = comparison.measured[0] if comparison.measured else None
    return {
        "inside": list(INSIDE),
        "settings": {
            "warmup": plan.warmup,
            "repeats": plan.repeats,
            "clients": plan.clients,
            "duration_seconds": plan.duration,
            "requests": [{**asdict(request), "images": list(request.images)} for request in plan.requests],
        },
        "machine": machine(),
        "versions": _versions(),
        "baseline": None if baseline is None else baseline.entry.label,
        "contestants": [_contestant(measured, baseline, judged) for measured in comparison.measured],
        "unavailable": [
            {
                "label": missing.entry.label,
                "bundle": str(missing.entry.bundle),
                "engine": missing.entry.engine,
                "reason": missing.reason,
                "failed": missing.failed,
            }
            for missing in comparison.missing
        ],
    }


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"system": platform.platform(), "cpu": names[0] if names else platform.processor(), "cores": cores}


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _contestant(measured: Measured, baseline: Measured | None, judged: Mapping[Path, Accuracy]) -> dict[str, Any]:
    samples, first = measured.samples, measured.samples[0]
    manifest = Manifest.read(measured.entry.bundle)
    stages: dict[str, Any] = {}
    for name in STAGES:
        if name == SCORING:
            stages[name] = _scoring(measured)
        else:
            values = pooled(samples, name)
            stages[name] = quantiles(values) if values else None
    return {
        "label": measured.entry.label,
        "name": measured.entry.name,
        "bundle": str(measured.entry.bundle),
        "engine": measured.entry.engine,
        "model": manifest.source,
        "recipe": manifest.recipe.get("name"),
        "vision_tokens": {"before": first.vision_tokens_before, "after": first.vision_tokens},
        "prompt_tokens": first.prompt_tokens,
        "answer_tokens": first.answer_tokens,
        "answer": first.answer,
        "stages": stages,
        "metrics": {name: quantiles(values) for name in METRICS if (values := pooled(samples, name))},
        "decode_in_all_ms": {"p50": _median_ms([sum(sample.decode) for sample in samples])},
        "tokens_per_second": float(np.median([sample.answer_tokens / sample.end_to_end for sample in samples])),
        "ratios": {} if baseline is None else ratios(measured, baseline),
        "load_seconds": measured.loaded.load_seconds,
        "device": measured.loaded.device,
        "host_peak_bytes": measured.host_peak_bytes,
        "host_before_load_bytes": measured.loaded.host_before_bytes,
        "device_peak_bytes": measured.device_peak_bytes,
        "bundle_bytes": measured.bundle_bytes,
        "accuracy": judged[measured.entry.bundle].to_dict() if measured.entry.bundle in judged else None,
        "load_test": None if measured.load is None else _load_test(measured.load),
        "samples": [asdict(sample) for sample in samples],
    }


def pooled(samples: Sequence[Sample], name: str) -> list[float]:
    """Returns all values of a stage or metric, in seconds; of decode one for each token."""
    if name == "decode":
        return [seconds for sample in samples for seconds in sample.decode]
    values = [getattr(sample, name) for sample in samples]
    return [value for value in values if value is not None]


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Returns percentiles in milliseconds, and how many values they are of."""
    points = np.percentile(np.asarray(seconds, np.float64) * 1e3, PERCENTILES)
    return {**{f"p{q}": float(point) for q, point in zip(PERCENTILES, points, strict=True)}, "samples": len(seconds)}


def ratios(measured: Measured, baseline: Measured) -> dict[str, dict[str, float]]:
    """Returns medians over the baseline's, with intervals; below 1 is faster. Rounds are paired."""
    found = {}
    for name in (*STAGES, *METRICS):
        if name in (SCORING, "other"):  # it may be 0
            continue
        ours, theirs = _by_round(measured.samples, name), _by_round(baseline.samples, name)
        if ours and len(ours) == len(theirs) and min(*ours, *theirs) > 0:
            interval = ratio_interval(ours, theirs, _SEED, statistic=percentile(50), paired=True)
            found[name] = interval.to_dict()
    return found


def _by_round(samples: Sequence[Sample], name: str) -> list[float]:
    if name == "decode":
        return [float(np.mean(sample.decode)) for sample in samples if sample.decode]
    return pooled(samples, name)


def _scoring(measured: Measured) -> dict[str, Any]:
    if measured.scoring is None:
        return {**dict.fromkeys(f"p{q}" for q in PERCENTILES), "samples": 0, "reason": measured.scoring_reason}
    whole, without = measured.scoring
    interval = paired_bootstrap(whole, without, _SEED, statistic=percentile(50))
    return {
        # The tails of a difference of two noisy times tell of the noise.
        **dict.fromkeys(f"p{q}" for q in PERCENTILES),
        "p50": interval.estimate * 1e3,
        "samples": len(whole),
        "interval_95": [interval.low * 1e3, interval.high * 1e3],
    }


def _load_test(run: LoadRun) -> dict[str, Any]:
    tokens = sum(sample.answer_tokens for sample in run.samples)
    return {
        "clients": run.clients,
        "seconds": run.seconds,
        "requests": len(run.samples),
        "requests_per_second": len(run.samples) / run.seconds,
        "tokens_per_second": tokens / run.seconds,
        "end_to_end": quantiles(pooled(run.samples, "end_to_end")),
        "ttft": quantiles(pooled(run.samples, "ttft")),
    }


def _median_ms(seconds: Sequence[float]) -> float:
    return float(np.median(seconds)) * 1e3
