"""The CUDA engine: refused where its provider does not load; its graphs run on the CPU, to 16-bit rounding."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qavp_export import pipeline
from qavp_export.bench import scoring
from qavp_export.engines import EngineOptions, load_engine
from qavp_export.engines.ort import cached, cuda, lowered
from qavp_export.engines.ort.plan import CPU_FOLDER, CUDA_FOLDER, PLAN_NAME, EnginePlan
from qavp_export.engines.ort.session import CPU_PROVIDER, CUDA_PROVIDER
from qavp_export.errors import BundleError, QavpError, UnavailableError
from qavp_export.manifest import Manifest
from qavp_export.recipe import make_recipe

OPTIONS = EngineOptions(threads=1)
# Of the largest logit: keys, values and queries of 16 bits differ by 2**-11 each; 2e-3 was seen. A wrong position:
# 0.1.
HALF_ROUNDING = 5e-3
# Float sums in another order; of the largest value.
ROUNDING = 2e-6

IMAGES = np.random.default_rng(1).standard_normal((2, 3, 40, 40)).astype(np.float32)
# Of 25 tokens.
ENCODED = {"pixel_values": IMAGES, "keep_tokens": np.array([9])}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    target = tmp_path_factory.mktemp("cuda") / "bundle"
    recipe = make_recipe("none", {"keep_range": (0.2, 0.6), "select": "dpp"})
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


def _graphs(bundle: Path, options: EngineOptions) -> lowered.LoweredGraphs:
    """Opens the engine's graphs on the CPU."""
    backend = lowered.Backend(CUDA_FOLDER, (CPU_PROVIDER,), "cpu", np.float16, ("float16",), vision="fp32")
    return lowered.LoweredGraphs(bundle, options, backend)


def test_its_graphs_compute_what_the_canonical_ones_do(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    engine = lowered.LoweredEngine(bundle, manifest, OPTIONS, _graphs(bundle, OPTIONS))
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


@pytest.mark.parametrize("vision", ["fp32", "w8a8"])
def test_the_cpu_selects_tokens(bundle: Path, vision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, tuple[str, ...]] = {}

    class Spy(lowered.Graph):
        def __init__(self, name: str, path: Path, *rest: Any) -> None:
            *given, providers = rest
            opened[path.stem] = providers
            super().__init__(name, path, *given, (CPU_PROVIDER,))

    monkeypatch.setattr(lowered, "Graph", Spy)
    backend = lowered.Backend(
        CUDA_FOLDER, (CUDA_PROVIDER, CPU_PROVIDER), "cpu", np.float16, ("float16",), vision="fp32"
    )
    encoder = lowered.LoweredGraphs(bundle, OPTIONS, backend).vision(vision)
    assert opened == {f"vision_encoder.{vision}": (CUDA_PROVIDER, CPU_PROVIDER), "selection": (CPU_PROVIDER,)}
    assert encoder.inputs == set(ENCODED)


def test_selected_tokens_are_those_of_the_canonical_encoder(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    engine = lowered.LoweredEngine(bundle, manifest, OPTIONS, _graphs(bundle, OPTIONS))
    features, kept = load_engine("ort-reference", bundle, manifest, OPTIONS).encode_images(ENCODED)
    found_features, found_kept = engine.encode_images(ENCODED)
    assert found_kept.shape == (2, 9)
    np.testing.assert_array_equal(found_kept, kept)
    np.testing.assert_allclose(found_features, features, rtol=0, atol=ROUNDING * np.abs(features).max())


def test_with_rounded_layers_the_same_graph_selects(bundle: Path) -> None:
    outputs = _graphs(bundle, OPTIONS).vision("w8a8").run(_values(ENCODED))
    plan = EnginePlan.read(bundle / CUDA_FOLDER)
    assert set(plan.graphs) >= {"selection", "vision_encoder.fp32", "vision_encoder.w8a8"}
    ends = {plan.graphs[f"vision_encoder.{precision}"].outputs for precision in ("fp32", "w8a8")}
    assert len(ends) == 1
    assert plan.graphs["vision_encoder.w8a8"].precision
    kept, everything = outputs["kept_indices"].numpy(), outputs["image_features_unpruned"].numpy()
    rows = np.take_along_axis(everything, kept[..., np.newaxis], axis=1)
    np.testing.assert_array_equal(outputs["image_features"].numpy(), rows)


def test_the_cpu_engine_has_one_graph(bundle: Path) -> None:
    plan = EnginePlan.read(bundle / CPU_FOLDER)
    assert "selection" not in plan.graphs
    assert plan.graphs["vision_encoder.fp32"].outputs == ("image_features", "kept_indices")


def _values(inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, ort.OrtValue]:
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}


def test_an_input_that_is_missing_is_named(bundle: Path) -> None:
    encoder = _graphs(bundle, OPTIONS).vision("fp32")
    with pytest.raises(QavpError, match=r"failed in the selection of tokens .*keep_tokens"):
        encoder.run(_values({"pixel_values": IMAGES}))


def test_a_bundle_without_the_selection_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    path = copy / CUDA_FOLDER / "selection.onnx"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(BundleError, match=r"selection.onnx cannot be opened"):
        _graphs(copy, OPTIONS).vision("fp32")
    path.unlink()
    with pytest.raises(BundleError, match=r"selection.onnx is missing; export the bundle again"):
        _graphs(copy, OPTIONS).vision("fp32")
    plan = json.loads((copy / CUDA_FOLDER / PLAN_NAME).read_text(encoding="utf-8"))
    del plan["graphs"]["selection"]
    (copy / CUDA_FOLDER / PLAN_NAME).write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(BundleError, match=r"engine.json has no graph 'selection'; export the bundle again"):
        _graphs(copy, OPTIONS).vision("fp32")


def test_what_selection_costs_is_measured_against_the_encoder_alone(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring.write_without_scoring(bundle, CUDA_FOLDER, tmp_path / "cut")
    cut = _graphs(tmp_path / "cut", OPTIONS).vision("fp32").run(_values({"pixel_values": IMAGES}))
    whole = _graphs(bundle, OPTIONS).vision("fp32").run(_values(ENCODED))
    features, everything = cut["image_features"].numpy(), whole["image_features_unpruned"].numpy()
    assert features.shape[:2] == (2, 25)
    # The same operators; what ONNX Runtime fuses at the end may round otherwise.
    np.testing.assert_allclose(features, everything, rtol=0, atol=ROUNDING * np.abs(everything).max())
    monkeypatch.setattr(scoring, "_OPENERS", {"ort-cuda": _graphs})
    with_selection, without = scoring.measure_scoring(bundle, "ort-cuda", OPTIONS, ENCODED, 2)
    assert len(with_selection) == len(without) >= 2
