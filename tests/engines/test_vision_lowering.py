"""Lowered vision encoders: integers against NumPy, features against transformers, every family against its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForImageTextToText

from qavp_export import pipeline
from qavp_export.engines.ort.lowering.capabilities import CPU, CPU_UNSIGNED, CUDA, Capabilities
from qavp_export.engines.ort.lowering.vision import VisionPrecision, lower_vision
from qavp_export.engines.ort.lowering.weights import Lowered
from qavp_export.engines.ort.weights import StoredTensor, WeightPlan, read_weights
from qavp_export.errors import GraphError
from qavp_export.numerics.one_level import quantize_one_level
from qavp_export.pipeline import _store_half
from qavp_export.recipe import make_recipe
from qavp_export.settings import settle
from qavp_export.source import Source, open_source
from qavp_export.tracing import build_skeleton, trace
from qavp_export.weight_file import WeightFile
from qavp_export.weights import CheckpointWeights
from tests.engines.lowered import codes_by_value
from tests.models.gemma3 import make_gemma3
from tests.models.idefics3 import make_idefics3
from tests.models.internvl import make_internvl
from tests.models.llava_next import make_llava_onevision
from tests.models.mistral3 import make_mistral3
from tests.models.paligemma import make_paligemma
from tests.models.tiny import TinySpec, make_llava

Array = npt.NDArray[Any]

MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "llava": make_llava,
    "llava-bfloat16": lambda folder: make_llava(folder, TinySpec(dtype=torch.bfloat16)),
    "internvl": make_internvl,
    "idefics3": make_idefics3,
    "gemma3": make_gemma3,
    "paligemma": make_paligemma,
    "llava_onevision": make_llava_onevision,
    "mistral3": make_mistral3,
}
CAPABILITIES = {"cpu": CPU, "cpu-unsigned": CPU_UNSIGNED, "cuda": CUDA}
# Float sums in another order; of the largest value.
ROUNDING = 2e-6
COMPONENT = "vision_encoder"
QUANTIZED = "QuantizeLinear"


def _overflows() -> bool:
    """Whether this processor adds pairs of unsigned times signed products in 16 bits."""
    codes = ir.Value(name="codes", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.UINT8))
    weight = ir.Value(name="weight", const_value=ir.tensor(np.full((64, 16), 127, np.int8), name="weight"))
    node = ir.node("MatMulInteger", [codes, weight])
    node.outputs[0].name, node.outputs[0].type = "product", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph([codes], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name="probe")
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    return bool((session.run(None, {"codes": np.full((1, 64), 255, np.uint8)})[0] != 64 * 255 * 127).any())


@pytest.fixture(scope="session", params=CAPABILITIES)
def capabilities(request: pytest.FixtureRequest) -> Capabilities:
    """What runs here of what providers run fast."""
    found = CAPABILITIES[request.param]
    if found is CPU and _overflows():
        pytest.skip("products of unsigned and signed bytes are not exact on this processor")
    return found


@dataclass(frozen=True)
class _Traced:
    """A tiny checkpoint and the graph of its vision encoder."""

    source: Source
    graph: ir.Model
    weights: CheckpointWeights


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], _Traced]:
    """Traces a model's vision encoder, once; its other components would take most of the time."""

    @cache
    def make(name: str) -> _Traced:
        source = open_source(MAKERS[name](tmp_path_factory.mktemp("vision") / name), name)
        skeleton, mode = build_skeleton(source.config)
        weights = CheckpointWeights(source.checkpoint, source.family, skeleton)
        with mode:
            request = trace._vision_request(source.family, source.family.vision_encoder(skeleton), source.plan)
        names = {id(module): path for path, module in skeleton.named_modules()}
        return _Traced(source, trace._trace(request, mode, names, weights.tensor), weights)

    return make


@pytest.fixture(scope="session")
def bundle_of(traced: Callable[[str], _Traced], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a folder that holds a model's vision encoder as a bundle does, at half the tokens or at all."""

    @cache
    def bundle(name: str, keep: float = 0.5) -> Path:
        found = traced(name)
        graph, source = found.graph.clone(), found.source
        pipeline.prune({COMPONENT: graph}, settle(make_recipe("none", {"keep": keep}), source.family, source.plan))
        _store_half(graph, found.weights)
        folder = tmp_path_factory.mktemp("bundle")
        (folder / COMPONENT).mkdir()
        WeightFile(folder / COMPONENT / "model.onnx", graph, {}).finish(lambda *_: None)
        return folder

    return bundle


def _canonical(bundle: Path) -> ir.Model:
    return ir.load(bundle / COMPONENT / "model.onnx")


def _lowered(bundle: Path, vision: VisionPrecision, capabilities: Capabilities = CPU_UNSIGNED) -> Lowered:
    return lower_vision(_canonical(bundle), vision, capabilities)


def _weights(bundle: Path, lowered: Lowered) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array) for name, array in read_weights(bundle, lowered.weights, 1)}


def _run(bundle: Path, lowered: Lowered, feeds: Mapping[str, Array], taps: tuple[str, ...] = ()) -> dict[str, Array]:
    """Runs a lowered graph with the weights that an engine would give it; `taps` are further values to return."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    weights = _weights(bundle, lowered)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    settings.add_external_initializers(list(weights), values)
    model = lowered.model.clone()
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(by_name[name] for name in taps)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, ["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _run_canonical(bundle: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(bundle / COMPONENT / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _feeds(model: ir.Model) -> dict[str, Array]:
    """Returns random images, two of them where the graph takes several, and what tells tokens apart."""
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "tiles": 2, "tokens": 10, "height": 16, "width": 24}
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[str(size)] for size in value.shape or ()]
        if value.name == "keep_tokens":
            feeds[value.name] = np.array([5])
        elif value.dtype == ir.DataType.INT64:
            feeds[str(value.name)] = rng.integers(0, 50, shape)
        else:
            feeds[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def _interface(model: ir.Model) -> list[tuple[str | None, ir.DataType | None, Any]]:
    return [(value.name, value.dtype, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]


def _of(lowered: Lowered, op_type: str) -> list[ir.Node]:
    return [node for node in lowered.model.graph if node.op_type == op_type]


@pytest.mark.parametrize("name", MAKERS)
def test_fp32_equals_canonical(bundle_of: Callable[..., Path], name: str) -> None:
    bundle = bundle_of(name)
    feeds = _feeds(_canonical(bundle))
    expected, lowered = _run_canonical(bundle, feeds), _lowered(bundle, "fp32")
    found = _run(bundle, lowered, feeds)
    np.testing.assert_array_equal(found["kept_indices"], expected["kept_indices"])
    features = expected["image_features"]
    np.testing.assert_allclose(found["image_features"], features, rtol=0, atol=ROUNDING * np.abs(features).max())
    assert not lowered.precision
    assert {plan.form for plan in lowered.weights} <= {"stored", "widened"}


@pytest.mark.parametrize("name", MAKERS)
def test_every_family_is_lowered_to_integers(bundle_of: Callable[..., Path], name: str) -> None:
    bundle = bundle_of(name)
    canonical = _canonical(bundle)
    lowered = lower_vision(canonical, "w8a8", CPU_UNSIGNED)
    interface = [
        [(value.name, value.shape) for value in side] for side in (canonical.graph.inputs, canonical.graph.outputs)
    ]
    graph = lowered.model.graph
    assert [[(value.name, value.shape) for value in side] for side in (graph.inputs, graph.outputs)] == interface
    layers = {
        str(node.name) for node in canonical.graph if node.op_type == "MatMul" and "/prune/" not in str(node.name)
    }
    assert layers
    assert lowered.precision == dict.fromkeys(layers, "w8a8")
    rounded = {plan.parts["tensor"] for plan in lowered.weights if "rounded" in plan.form}
    assert len(rounded) == len(layers)
    assert not rounded & {plan.parts["tensor"] for plan in lowered.weights if "rounded" not in plan.form}
    found = _run(bundle, lowered, _feeds(canonical))
    assert found["image_features"].shape[:2] == found["kept_indices"].shape
    assert np.isfinite(found["image_features"]).all()


def test_layers_that_read_one_value_share_its_codes(bundle_of: Callable[..., Path]) -> None:
    lowered = _lowered(bundle_of("llava"), "w8a8")
    # Two layers of (q/k/v, out, fc1, fc2), and a projector of two.
    assert len(_of(lowered, QUANTIZED)) == 2 * 4 + 2
    assert len(_of(lowered, "MatMulIntegerToFloat")) == 2 * 6 + 2


def test_integers_and_products_equal_numpy(bundle_of: Callable[..., Path], capabilities: Capabilities) -> None:
    bundle = bundle_of("llava")
    canonical, lowered = _canonical(bundle), _lowered(bundle, "w8a8", capabilities)
    shift = 128 if capabilities.activations == ir.DataType.UINT8 else 0
    weight_shift = 128 if capabilities.weights == ir.DataType.UINT8 else 0
    weights = _weights(bundle, lowered)
    codes_of = codes_by_value(lowered.model)
    graph = lowered.model.graph
    scaled = {str(node.name): str(node.outputs[0].name) for node in graph if str(node.name).endswith("/per_token")}
    taps = (*map(str, codes_of), *codes_of.values(), *scaled.values())
    found = _run(bundle, lowered, _feeds(canonical), taps)
    assert len(scaled) == len(lowered.precision) == 14
    for node in canonical.graph:
        if str(node.name) not in lowered.precision or node.inputs[0] is None or node.inputs[1] is None:
            continue
        cast = node.inputs[1].producer()
        stored = cast.inputs[0] if cast is not None else node.inputs[1]
        assert stored is not None
        assert stored.const_value is not None
        weight = quantize_one_level(
            np.ascontiguousarray(stored.const_value.numpy().T, np.float32), len(stored.const_value.numpy()), 8
        )
        form = "unsigned_rounded" if weight_shift else "rounded"
        np.testing.assert_array_equal(weights[f"{stored.name}.{form}"].astype(np.int64) - weight_shift, weight.codes.T)
        name = _replaced(node.inputs[0].name, codes_of)
        x = quantize_one_level(found[name], found[name].shape[-1], 8)
        np.testing.assert_array_equal(found[codes_of[name]].astype(np.int64) - shift, x.codes)
        product = (x.codes.astype(np.int64) @ weight.codes.T.astype(np.int64)) * (
            x.scales * weight.scales[:, 0].astype(np.float64)
        )
        result = found[scaled[f"{node.name}/per_token"]]
        np.testing.assert_allclose(result, product, rtol=0, atol=ROUNDING * np.abs(product).max())


def _replaced(name: str | None, codes_of: Mapping[str, str]) -> str:
    """Returns the value that a layer reads once attention is by token."""
    return str(name) if name in codes_of else str(name).replace("Reshape_3", "Attention/by_token_output_0")


class _W8A8(torch.nn.Module):
    """A linear layer with weights rounded for each output channel and inputs for each token."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float().numpy()
        self.weight = quantize_one_level(weight, weight.shape[1], 8)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = quantize_one_level(x.detach().numpy(), x.shape[-1], 8)
        product = codes.codes.astype(np.int64) @ self.weight.codes.T.astype(np.int64)
        scaled = torch.from_numpy((product * codes.scales * self.weight.scales[:, 0]).astype(np.float32))
        return scaled if self.bias is None else scaled + self.bias


def _round_linears(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, _W8A8(child))
        else:
            _round_linears(child)


@pytest.mark.parametrize("name", ["llava", "llava-bfloat16", "internvl", "paligemma"])
def test_features_equal_transformers_with_rounded_layers(
    traced: Callable[[str], _Traced], bundle_of: Callable[..., Path], name: str
) -> None:
    bundle = bundle_of(name, 1.0)
    folder = traced(name).source.checkpoint.folder
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    sides = [size for size in _canonical(bundle).graph.inputs[0].shape or () if isinstance(size, int)]
    pixels = np.random.default_rng(0).standard_normal((6, *sides)).astype(np.float32)

    def features() -> Array:
        with torch.no_grad():
            return np.stack(list(model.get_image_features(torch.from_numpy(pixels)).pooler_output))

    unrounded = features()
    _round_linears(model.model.vision_tower)
    _round_linears(model.model.multi_modal_projector)
    expected = features()
    found = _run(bundle, _lowered(bundle, "w8a8"), {"pixel_values": pixels})["image_features"]

    def error(other: Array) -> float:
        """Of the largest value, that of the token in the middle of all tokens' errors."""
        return float(np.median(np.abs(other - expected).max(axis=-1)) / np.abs(expected).max())

    # A sum in another order puts a code beside a half on its other side now and then, which moves that token by up to
    # a hundredth, and a little those of the same image that attend to it: the others agree to rounding.
    assert error(found) < ROUNDING
    assert error(unrounded) > 1000 * ROUNDING


def test_attention_reads_tokens_where_heads_are_views_of_them(bundle_of: Callable[..., Path]) -> None:
    sites = _of(_lowered(bundle_of("llava"), "fp32"), "Attention")
    assert [[len(value.shape or ()) for value in node.inputs if value] for node in sites] == [[3, 3, 3]] * 2
    # Rotary embeddings stand between.
    sites = _of(_lowered(bundle_of("mistral3"), "fp32"), "Attention")
    assert [[len(value.shape or ()) for value in node.inputs if value] for node in sites] == [[4, 4, 4]] * 2


def _products(folder: Path) -> Path:
    """Writes a graph of products of which only the first is a linear layer that can be lowered."""
    rng = np.random.default_rng(0)
    dims = {"x": ["batch", 5, 8], "unknown": ["batch", 5, "channels"], "stack": [2, 5, 8]}
    inputs = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in dims.items()
    }
    weights = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32)),
        )
        for name, shape in {"matrix": [8, 24], "other": [8, 23], "matrices": [2, 8, 24], "inline": [8, 3]}.items()
    }
    pairs = [("x", "matrix"), ("unknown", "other"), ("stack", "matrices"), ("x", "inline")]
    nodes = [ir.node("MatMul", [inputs[x], weights[weight]], name=f"/{weight}") for x, weight in pairs]
    for node, (x, weight) in zip(nodes, pairs, strict=True):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}_output", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([*dims[x][:2], weights[weight].shape[-1]])  # type: ignore[index]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        inputs.values(), outputs, nodes=nodes, initializers=weights.values(), opset_imports={"": 23}, name="products"
    )
    (folder / COMPONENT).mkdir()
    WeightFile(folder / COMPONENT / "model.onnx", ir.Model(graph, ir_version=10), {}).finish(lambda *_: None)
    return folder


def test_other_products_stay_float(tmp_path: Path) -> None:
    bundle = _products(tmp_path)
    lowered = _lowered(bundle, "w8a8")
    assert lowered.precision == {"/matrix": "w8a8"}
    assert [node.name for node in _of(lowered, "MatMul")] == ["/other", "/matrices", "/inline"]
    rng = np.random.default_rng(1)
    shapes = {"x": (3, 5, 8), "unknown": (3, 5, 8), "stack": (2, 5, 8)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected, found = _run_canonical(bundle, feeds), _run(bundle, lowered, feeds)
    for name in ("/other_output", "/matrices_output", "/inline_output"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_half_weight_that_is_not_cast_is_refused(bundle_of: Callable[..., Path]) -> None:
    model = _canonical(bundle_of("llava"))
    half = next(value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT16)
    node = ir.node("Identity", [half], name="/other")
    node.outputs[0].name, node.outputs[0].type = "other", ir.TensorType(ir.DataType.FLOAT16)
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    with pytest.raises(GraphError, match="Identity '/other' reads the 16-bit weight"):
        lower_vision(model, "fp32", CPU)


# Zero times anything would do, but not zero by zero.
@pytest.mark.filterwarnings("error")
def test_weights_of_zero_and_of_16_bits(tmp_path: Path) -> None:
    codes = np.zeros((3, 2), np.uint16)
    codes[:, 1] = torch.tensor([1.5, -3.0, 0.75]).to(torch.bfloat16).view(torch.uint16).numpy()
    (tmp_path / "data").write_bytes(codes.tobytes())
    stored = {"tensor": StoredTensor("data", 0, codes.nbytes, "BFLOAT16", codes.shape)}
    forms = ("rounded", "unsigned_rounded", "rounded_scales", "widened")
    made = dict(read_weights(tmp_path, [WeightPlan(form, form, stored) for form in forms], 1))
    # 3 / 127 per step: 1.5 is 63.5 steps and 0.75 is 31.75; halves go to the even code.
    np.testing.assert_array_equal(made["rounded"], [[0, 64], [0, -127], [0, 32]])
    np.testing.assert_array_equal(made["unsigned_rounded"], [[128, 192], [128, 1], [128, 160]])
    np.testing.assert_array_equal(made["rounded_scales"], np.array([0, 3], np.float32) / np.float32(127))
    np.testing.assert_array_equal(made["widened"], np.array([[0, 1.5], [0, -3], [0, 0.75]], np.float32))
