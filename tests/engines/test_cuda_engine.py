"""The CUDA engine: refused where its provider does not load; its graphs run on the CPU, to 16-bit rounding."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qavp_export import pipeline
from qavp_export.engines import EngineOptions, load_engine
from qavp_export.engines.ort import cached, cuda, lowered
from qavp_export.engines.ort.plan import CUDA_FOLDER
from qavp_export.engines.ort.session import CPU_PROVIDER, CUDA_PROVIDER
from qavp_export.errors import UnavailableError
from qavp_export.manifest import Manifest
from qavp_export.recipe import make_recipe

OPTIONS = EngineOptions(threads=1)
# Of the largest logit: keys, values and queries of 16 bits differ by 2**-11 each; 2e-3 was seen. A wrong position:
# 0.1.
HALF_ROUNDING = 5e-3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    target = tmp_path_factory.mktemp("cuda") / "bundle"
    recipe = make_recipe("none", {"keep": 0.25})
    pipeline.export(tiny_llava, recipe, target, name="tiny", force=False, progress=lambda *_: None)
    return target


def test_without_a_driver(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER])
    with pytest.raises(UnavailableError, match=r"'ort-cuda' is not available here: no NVIDIA driver .*libcuda.so.1"):
        load_engine("ort-cuda", bundle, Manifest.read(bundle), OPTIONS)


def test_with_an_onnx_runtime_that_has_no_cuda(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    with pytest.raises(UnavailableError, match="is built without CUDA; install onnxruntime-gpu"):
        load_engine("ort-cuda", bundle, Manifest.read(bundle), OPTIONS)


def test_a_provider_that_does_not_load_is_no_reason_to_run_on_the_cpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "check_driver", lambda: None)
    monkeypatch.setattr(lowered.Graph, "providers", lambda _: [CPU_PROVIDER])
    with pytest.raises(UnavailableError, match="the CUDA provider does not load"):
        load_engine("ort-cuda", bundle, Manifest.read(bundle), OPTIONS)


class _CopyingBinding:
    """Copies inputs when they are bound, as a binding of a session on a GPU does; runs see the copies."""

    def __init__(self) -> None:
        self.seen: dict[str, np.ndarray] = {}

    def bind_ortvalue_input(self, name: str, value: ort.OrtValue) -> None:
        self.seen[name] = value.numpy().copy()


def test_each_step_binds_what_has_changed() -> None:
    binding = _CopyingBinding()
    step = cached._Step.of(binding, 2, frozenset({"position_ids", "seqlens_k", "total_sequence_length"}), "cuda")
    for length in (5, 6):
        step.set(np.array([[length - 1], [length - 3]]), np.array([length - 1, length - 3]), length)
        assert {name: array.tolist() for name, array in binding.seen.items()} == {
            "position_ids": [[length - 1], [length - 3]],
            "seqlens_k": [length - 1, length - 3],
            "total_sequence_length": length,
        }


def test_its_graphs_compute_what_the_canonical_ones_do(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    backend = lowered.Backend(CUDA_FOLDER, (CPU_PROVIDER,), "cpu", np.float16, ("float16",), vision="fp32")
    graphs = lowered.LoweredGraphs(bundle, OPTIONS, backend)
    engine = lowered.LoweredEngine(bundle, manifest, OPTIONS, graphs)
    reference = load_engine("ort-reference", bundle, manifest, OPTIONS)
    rng = np.random.default_rng(3)
    spec, mask = manifest.decoder, np.ones((2, 9), np.int64)
    mask[1, :4] = 0
    embeds = rng.standard_normal((2, 9, spec.hidden_size)).astype(np.float32)
    tokens = rng.choice(np.setdiff1d(np.arange(spec.vocab_size), [manifest.vision_tokens.image_token_id]), (6, 2, 1))
    answers = []
    for each in (reference, engine):
        session, seen = each.start(), mask
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        logits = [session.prefill(embeds, mask, positions, logits_to_keep=1)]
        positions = positions[:, -1:]
        for token in tokens:
            seen, positions = np.pad(seen, ((0, 0), (0, 1)), constant_values=1), positions + 1
            logits.append(session.decode(token, seen, positions))
        answers.append(np.stack(logits))
    expected, got = answers
    assert np.abs(got - expected).max() <= HALF_ROUNDING * np.abs(expected).max()
    assert np.abs(got - expected).max() > 0
