"""What TensorRT builds against the canonical graph; tests/families compare attention of every kind of decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qavp_export import pipeline
from qavp_export.engines.tensorrt.keys import Profiles
from qavp_export.engines.tensorrt.lowering.capabilities import TENSORRT, TENSORRT_10_13, TENSORRT_10_14, TENSORRT_RTX
from qavp_export.engines.tensorrt.lowering.decoder import lower_decoder
from qavp_export.engines.tensorrt.lowering.vision import lower_vision
from qavp_export.engines.tensorrt.profiles import decoder_profiles, embedding_profiles, settle_profiles, vision_profiles
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import InputError
from qavp_export.manifest import VisionTokens
from qavp_export.passes import SCHEMES, PlaceQdq, RoundWeights, realized_precision
from qavp_export.recipe import make_recipe
from tests.engines.cached_decoders import HALF, Decoders
from tests.engines.lowered import Array, nodes_of
from tests.engines.prompts import Prompt
from tests.engines.trt_decoder import HALVES, TrtDecoder, in_float32
from tests.families.harness import ROUNDING, open_graph
from tests.passes.decoders import llama_decoder

FLAVOURS = {"tensorrt": TENSORRT, "tensorrt-rtx": TENSORRT_RTX}
OLDER = {"tensorrt 10.13": TENSORRT_10_13, "tensorrt 10.14": TENSORRT_10_14}
# Norms that are written out add up in another order, which with 8-bit activations changes the code of one token.
_EXACT = [(scheme, flavour) for scheme in SCHEMES for flavour in FLAVOURS]
_EXACT += [(scheme, flavour) for scheme in ("w4a4", "w8a16") for flavour in OLDER]
CAPACITY = 24


@pytest.fixture(scope="module")
def exported(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without quantization, and without a diverse selection: `test_tensorrt_select` has that."""
    target = tmp_path_factory.mktemp("exported") / "bundle"
    recipe = make_recipe("none", {"select": "topk"})
    pipeline.export(tiny_llava, recipe, target, name="tiny", force=False, progress=lambda *_: None)
    return target


@pytest.fixture
def vision(exported: Path) -> ir.Model:
    """Its vision encoder, weights in memory."""
    return ir.external_data.load_to_model(ir.load(exported / "vision_encoder" / "model.onnx"))


def _quantized(scheme: str) -> tuple[ir.Model, Any]:
    model, plan = llama_decoder()
    patterns = (("/lm_head/*", SCHEMES["w8a16"]), ("*", SCHEMES[scheme]))
    PlaceQdq(16, patterns, RoundWeights(clip_search=False))(model)
    return model, plan


@pytest.mark.parametrize(("scheme", "flavour"), _EXACT)
def test_quantized_decoders_compute_what_the_canonical_graph_does(scheme: str, flavour: str, tmp_path: Path) -> None:
    model, plan = _quantized(scheme)
    decoders = Decoders.of(model, plan, tmp_path)
    stored = ir.load(tmp_path / "decoder" / "model.onnx")
    prompt = Prompt.random(plan.vocab_size, (9, 6), 5)
    expected, steps = decoders.canonical_answer(prompt)
    real = prompt.mask == 1
    # Structure alone: in float32, but for 8-bit weights with group scales, the head's among them, which are dequantized
    # to 16 bits, half a last bit of 5e-4 off. Codes of activations would differ where a sum in another order falls on
    # the other side of a half; none does here.
    trt = TrtDecoder.of(stored, plan, CAPACITY, half=False, capabilities={**FLAVOURS, **OLDER}[flavour])
    logits = trt.prefill(decoders.table[prompt.ids], prompt, 9)
    bound = 2e-3 * np.abs(expected).max()
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=bound)
    for actual, wanted in zip(trt.answer(decoders.table, prompt.answer), steps, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound)


def test_a_second_prompt_part_goes_on_from_the_first(tmp_path: Path) -> None:
    decoders = Decoders.of(*llama_decoder(), tmp_path)
    plan = llama_decoder()[1]
    prompt = Prompt.random(plan.vocab_size, (7, 4), 6)
    _, steps = decoders.canonical_answer(prompt)
    trt = TrtDecoder.of(ir.load(tmp_path / "decoder" / "model.onnx"), plan, CAPACITY, half=False)
    trt.prefill(decoders.table[prompt.ids], prompt, 1)
    logits = trt.extend(decoders.table[prompt.answer])
    expected = np.stack(steps, axis=1)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def test_the_engine_takes_and_gives_what_the_session_binds() -> None:
    model, plan = llama_decoder()
    graph = lower_decoder(model, plan.context_length, CAPACITY, TENSORRT_RTX).model.graph
    shapes = {str(value.name): (value.dtype, [str(size) for size in value.shape or ()]) for value in graph.inputs}
    cache = (ir.DataType.FLOAT16, ["batch", "2", "24", "16"])
    int64 = ir.DataType.INT64
    assert shapes == {
        "inputs_embeds": (ir.DataType.FLOAT, ["batch", "sequence", "96"]),
        "position_ids": (int64, ["batch", "sequence"]),
        "logit_positions": (int64, ["batch", "rows"]),
        "write_indices": (int64, ["batch"]),
        **{f"past_key_values.{layer}.{part}": cache for layer in range(2) for part in ("key", "value")},
    }
    outputs = {str(value.name): value for value in graph.outputs}
    assert set(outputs) == {"logits", *(f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value"))}
    assert [str(size) for size in outputs["logits"].shape or ()] == ["batch", "rows", "67"]
    for name, value in outputs.items():
        node = value.producer()
        # TensorRT updates a cache in place only where it is input and output of the network.
        if name != "logits":
            assert node is not None
            assert node.op_type == "TensorScatter"
            assert node.inputs[0] in graph.inputs


def test_the_canonical_graph_is_not_changed() -> None:
    model, plan = _quantized("w4a4")
    before = ir.to_proto(model).SerializeToString()
    for capabilities in FLAVOURS.values():
        lower_decoder(model, plan.context_length, CAPACITY, capabilities)
    assert ir.to_proto(model).SerializeToString() == before


def test_w4a4_layers_are_plugins_where_there_are_plugins() -> None:
    model, plan = _quantized("w4a4")
    with_plugins, without = (
        lower_decoder(model, plan.context_length, CAPACITY, capabilities) for capabilities in (TENSORRT, TENSORRT_RTX)
    )
    assert list(with_plugins.expected.values()).count("plugin") == 14
    assert len(nodes_of(with_plugins.model, "W4A4MatMul")) == 14
    # q, k and v share a quantizer, and gate and up.
    assert len(nodes_of(with_plugins.model, "QuantizeTwoLevel")) == 8
    assert not nodes_of(without.model, "W4A4MatMul")
    assert list(without.expected.values()).count("int4 x float32") == 14
    for network in (with_plugins, without):
        assert network.requested.keys() == network.expected.keys()
        assert network.requested["/lm_head/MatMul"] == "w8a16"
        assert network.expected["/lm_head/MatMul"] == "float16 x float16"
        assert list(network.requested.values()).count("w4a4") == 14


def test_layers_that_stay_quantizers_are_told_of() -> None:
    model, plan = llama_decoder()
    # 96 channels are three groups of 32, and 160 five; the kernels take groups that are powers of two.
    patterns = (("/model/layers.0/mlp/down_proj/*", SCHEMES["w4a4"]), ("/model/layers.1/*", SCHEMES["w4a4"]))
    PlaceQdq(48, patterns[1:], RoundWeights(clip_search=False))(model)
    network = lower_decoder(model, plan.context_length, CAPACITY, TENSORRT)
    assert "plugin" not in network.expected.values()
    (note,) = network.notes
    assert note.startswith("/model/layers.1/attn/q_proj/MatMul, like ")
    assert note.endswith("channels, not of 48")
    assert lower_decoder(model, plan.context_length, CAPACITY, TENSORRT_RTX).notes == ()


def test_no_8_bit_unsigned_weight_is_left() -> None:
    # TensorRT's parser refuses them.
    model, plan = _quantized("w4a4")
    for capabilities in FLAVOURS.values():
        graph = lower_decoder(model, plan.context_length, CAPACITY, capabilities).model.graph
        assert ir.DataType.UINT8 not in {value.dtype for value in graph.initializers.values()}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_vision_runs_in_16_bits_and_scores_in_32(flavour: str, vision: ir.Model) -> None:
    network = lower_vision(vision, FLAVOURS[flavour])
    _check_scores_in_float(network.model)
    linears = {layer.node for layer in realized_precision(vision) if not layer.node.startswith("/prune")}
    assert linears < network.expected.keys()
    convolutions = {str(node.name) for node in nodes_of(vision, "Conv")}
    assert convolutions < network.expected.keys()
    for node in network.model.graph:
        if node.name in network.expected:
            assert {value.dtype for value in node.inputs if value is not None} == {ir.DataType.FLOAT16}, node.name
    kinds = {node.op_type for node in network.model.graph}
    assert ({"TokenSensitivity", "MixTokenScore"} <= kinds) == FLAVOURS[flavour].plugins
    assert ("HybridTokenScore" in kinds) != FLAVOURS[flavour].plugins


def test_a_score_that_no_plugin_takes_is_told_of(vision: ir.Model) -> None:
    assert lower_vision(vision, TENSORRT).notes == ()
    (node,) = nodes_of(vision, "HybridTokenScore")
    node.attributes["group_size"] = ir.AttrInt64("group_size", 12)
    reason = "the scoring kernel takes group sizes 16, 32, ... 1024, not 12"
    assert lower_vision(vision, TENSORRT).notes == (f"{node.name} is inlined: {reason}",)
    assert lower_vision(vision, TENSORRT_RTX).notes == ()


def test_a_product_that_scores_stays_in_32_bits(vision: ir.Model) -> None:
    product = next(node for node in nodes_of(vision, "MatMul") if "multi_modal_projector" in str(node.name))
    product.name = "/prune/odd"
    network = lower_vision(vision, TENSORRT_RTX)
    assert "/prune/odd" not in network.expected
    _check_scores_in_float(network.model)


@pytest.mark.parametrize("flavour", [*FLAVOURS, "tensorrt 10.13"])
def test_vision_computes_what_the_canonical_graph_does(flavour: str, vision: ir.Model) -> None:
    pixels = np.random.default_rng(3).standard_normal((3, 3, 40, 40)).astype(np.float32)
    expected = _run(vision, pixels)
    lowered = lower_vision(vision, {**FLAVOURS, **OLDER}[flavour]).model
    found = _run(in_float32(lowered), pixels)
    np.testing.assert_array_equal(found["kept_indices"], expected["kept_indices"])
    largest = np.abs(expected["image_features"]).max()
    np.testing.assert_allclose(found["image_features"], expected["image_features"], rtol=0, atol=ROUNDING * largest)
    in_half = _run(lowered, pixels)
    same = (in_half["kept_indices"] == expected["kept_indices"]).all(axis=1)
    # Scores that are close may change places.
    assert same.any()
    difference = np.abs(in_half["image_features"] - expected["image_features"])[same]
    assert 0 < difference.max() <= HALF * largest


def _check_scores_in_float(model: ir.Model) -> None:
    for node in model.graph:
        if str(node.name).startswith("/prune"):
            types = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
            assert not types & set(HALVES), node.name


def _run(model: ir.Model, pixels: Array) -> dict[str, Array]:
    session = open_graph(model)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": pixels}), strict=True))


GRID = VisionTokens(25, 3, "<image>", 4, "contiguous", 0.125)
TILES = VisionTokens(
    None,
    None,
    "<image>",
    4,
    "contiguous",
    0.25,
    layout="tiles",
    layout_settings={"grid_pinpoints": [[40, 80], [120, 40]], "tile_size": 40, "tile_patches": 5, "max_tiles": None},
)
NATIVE = VisionTokens(
    None,
    None,
    "<image>",
    4,
    "contiguous",
    0.5,
    layout="native",
    layout_settings={"patch_size": 4, "spatial_merge_size": 2},
)


def _graph(**shapes: list[int | str]) -> ir.Model:
    inputs = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in shapes.items()
    ]
    return ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 23}), ir_version=10)


def test_profiles_of_the_vision_encoder_by_layout() -> None:
    (profile,) = vision_profiles(_graph(pixel_values=["batch", 3, 40, 40]), GRID, None)
    assert profile == {"pixel_values": ((1, 3, 40, 40), (1, 3, 40, 40), (8, 3, 40, 40))}
    model = _graph(pixel_values=["tiles", 3, 40, 40], token_indices=["tokens"], keep_tokens=[1])
    (profile,) = vision_profiles(model, TILES, None)
    # The whole picture, and three tiles above one another: 15 rows of 5 tokens and a token behind each row.
    assert profile["pixel_values"][2] == (4, 3, 40, 40)
    assert profile["token_indices"][2] == (25 + 15 * 6,)
    assert profile["keep_tokens"] == ((1,), (29,), (115,))
    model = _graph(pixel_values=[1, 3, "height", "width"], keep_tokens=[1])
    (profile,) = vision_profiles(model, NATIVE, 64)
    assert profile == {
        "pixel_values": ((1, 3, 8, 8), (1, 3, 32, 32), (1, 3, 64, 64)),
        "keep_tokens": ((1,), (8,), (64,)),
    }


def test_profiles_of_decoder_and_embedding() -> None:
    limits = Profiles(max_prompt=96, capacity=96, max_batch=4)
    model = _graph(inputs_embeds=["batch", "sequence", 8], logit_positions=["batch", "rows"], write_indices=["batch"])
    prefill, decode = decoder_profiles(model, limits, GRID)
    assert prefill["inputs_embeds"] == ((1, 1, 8), (1, 67, 8), (4, 96, 8))
    assert prefill["logit_positions"] == ((1, 1), (1, 1), (4, 96))
    assert decode["inputs_embeds"] == ((1, 1, 8), (1, 1, 8), (4, 1, 8))
    assert decode["write_indices"] == ((1,), (1,), (4,))
    model = _graph(input_ids=["batch", "sequence"], image_features=["images", "tokens_per_image", 8])
    (profile,) = embedding_profiles(model, limits, GRID)
    assert profile["image_features"] == ((1, 3, 8), (1, 3, 8), (128, 3, 8))
    (profile,) = embedding_profiles(model, limits, TILES)
    assert profile["image_features"] == ((1, 1, 8), (1, 64, 8), (4, 384, 8))


def test_capacities_that_do_not_fit_the_model_are_refused() -> None:
    assert settle_profiles(EngineTargets(max_batch=2), 128, 3) == Profiles(128, 128, 2)
    assert settle_profiles(EngineTargets(), 4096, None) == Profiles(2048, 2048, 4)
    assert settle_profiles(EngineTargets(max_tokens=4096), 4096, None) == Profiles(4096, 4096, 4)
    with pytest.raises(InputError, match="--max-tokens is 129; the model's context has 128 tokens"):
        settle_profiles(EngineTargets(max_tokens=129), 128, 3)
    with pytest.raises(InputError, match="an image alone takes 3"):
        settle_profiles(EngineTargets(max_tokens=3), 128, 3)
