"""TensorRT-RTX builds engines for GPUs that are not there; tests/families build those of every other family."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qavp_export import pipeline
from qavp_export.cli.common import run_command
from qavp_export.cli.export import app
from qavp_export.engines.tensorrt.inspector import EngineLayer, mismatches, parse_log, realized_precision
from qavp_export.engines.tensorrt.keys import TENSORRT_RTX, EngineKeys, Profiles
from qavp_export.engines.tensorrt.lowering.capabilities import TENSORRT_10_13, Capabilities
from qavp_export.engines.tensorrt.lowering.capabilities import TENSORRT_RTX as RTX_CAPABILITIES
from qavp_export.engines.tensorrt.lowering.decoder import lower_decoder
from qavp_export.engines.tensorrt.lowering.network import LoweredNetwork
from qavp_export.engines.tensorrt.lowering.vision import lower_vision
from qavp_export.engines.tensorrt.process import run_worker
from qavp_export.engines.tensorrt.profiles import Profile, decoder_profiles, vision_profiles
from qavp_export.engines.tensorrt.worker import Request
from qavp_export.errors import QavpError
from qavp_export.manifest import Manifest, VisionTokens
from qavp_export.numerics.diverse import Diversity
from qavp_export.passes import SCHEMES, PlaceQdq, RoundWeights
from qavp_export.passes import realized_precision as canonical_precision
from qavp_export.recipe import make_recipe
from qavp_export.verify import verify
from tests.engines.rtx import CAPABILITIES, REALIZED, RTX, check_engines, requires_rtx
from tests.engines.tensorrt_graphs import attended
from tests.models.tiny import TinySpec, make_llava
from tests.passes.decoders import llama_decoder

pytestmark = requires_rtx

TOKENS = VisionTokens(25, 3, "<image>", 4, "contiguous", 0.125)


def _run(*argv: str) -> int:
    return run_command(app, "qavp-export", list(argv))


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of the default recipe for all capabilities."""
    target = tmp_path_factory.mktemp("cli") / "bundle"
    sm = ",".join(map(str, CAPABILITIES[:2]))
    # Diverse selection is a Loop.
    options = [
        "--select",
        "dpp",
        "--engine",
        "ort-cpu,tensorrt-rtx",
        "--sm",
        sm,
        "--sm",
        "89",
        "--sm",
        "120",
        "--capability-report",
    ]
    assert _run("--model", str(tiny_llava), "-o", str(target), "--json", *options, "--max-tokens", "96") == 0
    return target


def test_the_command_builds_every_engine_without_a_gpu(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    check_engines(manifest, bundle)
    keys = EngineKeys.read(bundle, TENSORRT_RTX)
    assert (keys.driver, keys.profiles) == (None, Profiles(96, 96, 4))
    assert sum(name == "w4a4" for name in keys.graphs["decoder"].requested.values()) == 14
    assert set(manifest.engines) == {"ort-cpu", "ort-cuda", "tensorrt-rtx"}
    (note,) = keys.notes
    assert "activations are rounded" in note
    verify(bundle)


def test_nothing_else_is_left_in_the_bundle(bundle: Path) -> None:
    names = ("vision_encoder", "embedding", "decoder")
    expected = {"engine.json", *(f"{name}{end}" for name in names for end in (".engine", ".capability.txt"))}
    assert {path.name for path in (bundle / "engines" / TENSORRT_RTX).iterdir()} == expected
    report = (bundle / "engines" / TENSORRT_RTX / "decoder.capability.txt").read_text()
    assert "Graph is fully supported by TensorRT" in report
    assert str(bundle.parent) not in report


def test_a_changed_engine_is_found(bundle: Path) -> None:
    path = bundle / "engines" / TENSORRT_RTX / "embedding.engine"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(QavpError, match=r"embedding\.engine was changed"):
            verify(bundle)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_every_layer_multiplies_fp4_by_fp4_on_blackwell(decoder: str, tmp_path: Path) -> None:
    # Qwen2's has biases.
    checkpoint = make_llava(tmp_path / "checkpoint", TinySpec(decoder=decoder))
    targets = dataclasses.replace(RTX, capabilities=(120,))
    quiet = lambda *_: None  # noqa: E731
    made = make_recipe("nvfp4", {})
    manifest = pipeline.export(
        checkpoint, made, tmp_path / "b", name="tiny", force=False, progress=quiet, targets=targets
    )
    layers = manifest.engines[TENSORRT_RTX]["layers"]["decoder"]
    # The builder may drop to float32 without a word (NVIDIA/TensorRT#4833): codes and scales must reach the product.
    assert sorted(layers.values()).count(["nvfp4", "fp4 x fp4"]) == 14
    assert layers["/lm_head/MatMul"] == ["w8a16", "float16 x float16"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_built(scheme: str, tmp_path: Path) -> None:
    model, plan = llama_decoder()
    # The builder pads weights of 67 columns in every run, which dequantizes those of the head.
    PlaceQdq(16, (("/model/layers.*", SCHEMES[scheme]),), RoundWeights(clip_search=False))(model)
    expected = {layer.node: REALIZED[layer.precision] for layer in canonical_precision(model)}
    assert list(expected.values()).count(REALIZED[scheme]) == 14
    assert _build_decoder(model, plan, tmp_path)[1] == expected


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT])
def test_float_layers_run_as_they_are_stored(dtype: ir.DataType, tmp_path: Path) -> None:
    model, plan = llama_decoder()
    _store(model, dtype)
    names = {ir.DataType.FLOAT: "float32"}
    expected = f"{names.get(dtype, dtype.name.lower())} x {names.get(dtype, dtype.name.lower())}"
    realized = _build_decoder(model, plan, tmp_path)[1]
    assert set(realized.values()) == {expected}
    assert len(realized) == 15


def _store(model: ir.Model, dtype: ir.DataType) -> None:
    """Stores matrices in a type, with a cast behind each."""
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or weight.dtype == dtype:
            continue
        assert weight.const_value is not None
        stored = ir.Value(name=f"{weight.name}.stored", shape=weight.shape, type=ir.TensorType(dtype))
        stored.const_value = ir.tensor(weight.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=stored.name)
        model.graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, name=f"{weight.name}/cast")
        cast.outputs[0].name, cast.outputs[0].dtype = f"{weight.name}.wide", ir.DataType.FLOAT
        cast.outputs[0].shape = weight.shape
        model.graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])


def _build_decoder(model: ir.Model, plan: Any, folder: Path) -> tuple[Path, dict[str, str]]:
    """Builds a decoder; returns the engine, and what its linear layers run in."""
    network = lower_decoder(model, plan.context_length, 48, RTX_CAPABILITIES)
    engine, layers = _build_network(network, decoder_profiles(network.model, Profiles(48, 48, 2), TOKENS), folder)
    return engine, realized_precision(layers, [layer.node for layer in canonical_precision(model)])


def _build_network(
    network: LoweredNetwork, shapes: list[Profile], folder: Path, capabilities: tuple[int, ...] = CAPABILITIES
) -> tuple[Path, list[EngineLayer]]:
    """Builds a network; returns the engine and its layers."""
    path = folder / "network.onnx"
    ir.save(network.model, path, external_data="network.data")
    profiles = tuple({key: [list(bound) for bound in bounds] for key, bounds in one.items()} for one in shapes)
    engine = folder / "network.engine"
    report = run_worker(Request(TENSORRT_RTX, "", str(path), str(engine), profiles, capabilities=capabilities), folder)
    assert engine.stat().st_size > 0
    return engine, parse_log(report.layers)


def test_what_the_oldest_tensorrt_gets_is_parsed_and_built(bundle: Path, tmp_path: Path) -> None:
    # Without plugins, of which TensorRT-RTX has none.
    oldest = Capabilities(plugins=False, operators=TENSORRT_10_13.operators)
    model, plan = llama_decoder()
    decoder = lower_decoder(model, plan.context_length, 48, oldest)
    stored = ir.external_data.load_to_model(ir.load(bundle / "vision_encoder" / "model.onnx"))
    vision = lower_vision(stored, oldest)
    for network, shapes in (
        (decoder, decoder_profiles(decoder.model, Profiles(48, 48, 2), TOKENS)),
        (vision, vision_profiles(vision.model, TOKENS, None)),
    ):
        assert network.model.graph.opset_imports[""] == 21
        _, layers = _build_network(network, shapes, tmp_path, (89,))
        realized = realized_precision(layers, network.expected)
        assert mismatches(network.expected, realized) == []
        assert list(realized.values()).count("float16") == 2


@pytest.mark.parametrize("select", ["dpp", "maxmin"])
def test_diverse_selection_is_built_beside_attention(select: Diversity, tmp_path: Path) -> None:
    # A Loop, beside which the builder dies of attention operators, even of one.
    network = lower_vision(attended(select, 6), RTX_CAPABILITIES)
    shapes: Profile = {"x": ((1, 2, 23, 16), (1, 2, 23, 16), (8, 2, 23, 16)), "score": ((1, 23), (1, 23), (8, 23))}
    _, layers = _build_network(network, [shapes], tmp_path, (89,))
    assert realized_precision(layers, network.expected) == {"/attn/MatMul": "float16"}


def test_what_does_not_parse_is_one_line_and_leaves_no_engine(tmp_path: Path) -> None:
    value = ir.Value(name="x", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Unique", [value], {"sorted": 1}, name="odd")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([value], [node.outputs[0]], nodes=[node], opset_imports={"": 21}, name="odd")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "odd.onnx")
    request = Request(TENSORRT_RTX, "", str(tmp_path / "odd.onnx"), str(tmp_path / "odd.engine"), capabilities=(89,))
    with pytest.raises(QavpError, match="the parser refused odd") as caught:
        run_worker(request, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "odd.engine").exists()


REFUSED = {
    "fp4 before Blackwell": (("--format", "nvfp4", "--engine", "tensorrt-rtx", "--sm", "89"), 3, "nvfp4 needs a GPU"),
    "fp4 on one of two": (("--format", "nvfp4", "--engine", "tensorrt-rtx", "--sm", "120,86"), 3, "not 8.6; choose"),
    "Hopper": (("--engine", "tensorrt-rtx", "--sm", "90"), 3, "does not build this for --sm 90"),
    "no GPU": (("--engine", "tensorrt"), 3, "engine 'tensorrt' is not available here"),
    "no capability": (("--engine", "tensorrt-rtx"), 2, "--sm goes with --engine tensorrt-rtx"),
    "capability alone": (("--sm", "89"), 2, "--sm goes with --engine tensorrt-rtx"),
    "a word": (("--engine", "tensorrt-rtx", "--sm", "ada"), 2, "is no compute capability"),
    "unknown engine": (("--engine", "tensorflow"), 2, "does not exist; choose from ort-cpu"),
    "report alone": (("--capability-report",), 2, "--capability-report goes with"),
    "size alone": (("--max-tokens", "96"), 2, "--max-tokens goes with"),
    "too long": (("--engine", "tensorrt-rtx", "--sm", "89", "--max-tokens", "129"), 2, "context has 128 tokens"),
    "no room": (("--engine", "tensorrt-rtx", "--sm", "89", "--max-tokens", "0"), 2, "are 1 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_before_anything_is_done(
    case: str, tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, code, message = REFUSED[case]
    assert _run("--model", str(tiny_llava), "-o", str(tmp_path / "bundle"), *options) == code
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_the_summary_names_the_gpus(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from qavp_export.cli.report import print_summary

    print_summary(Manifest.read(bundle), bundle, "exported")
    text = " ".join(capfd.readouterr().out.split())
    assert "compute capability 8.0, 8.6, 8.9, 12.0; vision_encoder float16 x float16" in text
    assert json.loads((bundle / "engines" / TENSORRT_RTX / "engine.json").read_text())["flavour"] == TENSORRT_RTX
