"""The reference engine on the tiny bundle, and on bundles that are broken."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qavp_export import QavpModel
from qavp_export.engines import ENGINES, Engine, EngineOptions, available_engines, load_engine
from qavp_export.engines.ort.reference import OrtReferenceEngine
from qavp_export.errors import BundleError, InputError, PromptError, QavpError, UnavailableError
from qavp_export.manifest import MANIFEST_NAME, Manifest, TensorSpec
from tests.runtime.tiny_bundle import (
    AFTER,
    HIDDEN,
    IMAGE,
    MEAN,
    STD,
    VOCAB,
    make_weights,
    reference_features,
    reference_logits,
    write_bundle,
)

OPTIONS = EngineOptions(threads=1)
WEIGHTS = make_weights()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def manifest(bundle):
    return Manifest.read(bundle)


@pytest.fixture(scope="module")
def engine(bundle, manifest):
    return load_engine("ort-reference", bundle, manifest, OPTIONS)


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def no_images():
    return np.zeros((0, AFTER, HIDDEN), np.float32)


def test_registry(engine, bundle, manifest):
    assert {"ort-cpu", "ort-reference"} <= set(available_engines())
    assert isinstance(engine, Engine)
    with pytest.raises(TypeError):
        ENGINES["mine"] = ENGINES["ort-reference"]
    with pytest.raises(UnavailableError, match=r"'mine' .*ort-cpu") as caught:
        load_engine("mine", bundle, manifest, OPTIONS)
    assert caught.value.exit_code == 3


def test_engine_whose_package_is_missing(monkeypatch, bundle, manifest):
    monkeypatch.setitem(sys.modules, "qavp_export.engines.ort.reference", None)
    with pytest.raises(UnavailableError, match=r"cannot be imported .*; install onnxruntime"):
        load_engine("ort-reference", bundle, manifest, OPTIONS)


def test_encodes_images(engine):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    pixels = ((pictures / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    features, kept = engine.encode_images({"pixel_values": pixels})
    for index, picture in enumerate(pictures):
        expected, expected_kept = reference_features(picture)
        # means of four float32 values below 2 in magnitude
        np.testing.assert_allclose(features[index], expected, atol=1e-6)
        assert kept[index].tolist() == expected_kept


def test_embeds_text_and_images(engine):
    features = np.arange(2 * AFTER * HIDDEN, dtype=np.float32).reshape(2, AFTER, HIDDEN)
    ids = np.array([[5, IMAGE, IMAGE, 7], [IMAGE, IMAGE, 8, 9]])
    embeds = engine.embed(ids, features)
    np.testing.assert_array_equal(embeds[0, 1:3], features[0])
    np.testing.assert_array_equal(embeds[1, :2], features[1])
    np.testing.assert_array_equal(embeds[1, 2:], WEIGHTS.table[[8, 9]])
    np.testing.assert_array_equal(engine.embed(ids[:, 3:], no_images())[:, 0], WEIGHTS.table[[7, 9]])


def test_prefill_and_decode_carry_the_cache(engine):
    ids = np.array([[5, 9, 11, 20], [0, 0, 12, 13]])
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    positions = np.array([[0, 1, 2, 3], [0, 0, 0, 1]])
    session = engine.start()
    logits = session.prefill(engine.embed(ids, no_images()), mask, positions)
    assert logits.shape == (2, 4, VOCAB)
    history = [([5, 9, 11, 20], [0, 1, 2, 3]), ([12, 13], [0, 1])]
    for row_tokens in ([14, 15], [21, 6], [30, 31], [None, None]):
        for row, (tokens, where) in enumerate(history):
            expected = reference_logits(WEIGHTS.table[tokens].astype(np.float64), where)
            # sums of at most 7 float32 values of magnitude 1, through sine and a product of length 3
            np.testing.assert_allclose(logits[row, -1], expected, atol=1e-5)
        if row_tokens[0] is None:
            return
        for (tokens, where), token in zip(history, row_tokens, strict=True):
            tokens.append(token)
            where.append(where[-1] + 1)
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        logits = session.decode(np.array(row_tokens)[:, None], mask, np.array([where[-1:] for _, where in history]))


def test_keeps_the_last_logits_that_are_asked_for(engine):
    embeds, mask, positions = engine.embed(np.array([[5, 9, 11]]), no_images()), np.ones((1, 3), np.int64), np.arange(3)
    everything = engine.start().prefill(embeds, mask, positions[None])
    for keep in (1, 2, 3):
        kept = engine.start().prefill(embeds, mask, positions[None], logits_to_keep=keep)
        np.testing.assert_array_equal(kept, everything[:, 3 - keep :])


def test_reordered_rows_go_on_from_their_own_past(engine):
    ids, mask, positions = np.array([[5, 9], [11, 20], [7, 8]]), np.ones((3, 2), np.int64), np.array([[0, 1]] * 3)
    rows = np.array([2, 0, 0, 1])
    session, sorted_before = engine.start(), engine.start()
    session.prefill(engine.embed(ids, no_images()), mask, positions)
    session.reorder(rows)
    sorted_before.prefill(engine.embed(ids[rows], no_images()), mask[[0] * 4], positions[[0] * 4])
    step = np.array([[30], [31], [32], [33]]), np.ones((4, 3), np.int64), np.full((4, 1), 2)
    np.testing.assert_array_equal(session.decode(*step), sorted_before.decode(*step))


def test_sessions_of_one_engine_are_independent(engine):
    embeds = engine.embed(np.array([[5, 6]]), no_images())
    ones, positions = np.ones((1, 2), np.int64), np.array([[0, 1]])
    first, second = engine.start(), engine.start()
    first.prefill(embeds, ones, positions)
    second.prefill(embeds, ones, positions)
    step = (np.array([[9]]), np.ones((1, 3), np.int64), np.array([[2]]))
    expected = first.decode(*step)
    np.testing.assert_array_equal(second.decode(*step), expected)


def test_session_options_are_deliberate(engine):
    # Reads back what ONNX Runtime was told, from the session itself.
    session = engine._decoder.prefill._session
    options = session.get_session_options()
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL


@pytest.mark.parametrize("level", ["disable", "basic", "extended", "all"])
def test_quantized_weights_keep_float_activations_at_every_level(copy, manifest, level):
    # A decoder's output layer as the exporter writes it: an 8-bit weight, dequantized, times float activations.
    rng = np.random.default_rng(0)
    width, block = 64, 32
    codes = rng.integers(-127, 128, (width, VOCAB)).astype(np.int8)
    steps = rng.uniform(0.001, 0.01, (width // block, VOCAB)).astype(np.float32)
    model = onnx.load(copy / "decoder/model.onnx")
    graph = model.graph
    logits = next(node for node in graph.node if node.output[0] == "logits")
    logits.output[0] = "plain"
    graph.initializer.extend(
        [
            numpy_helper.from_array(codes, "codes"),
            numpy_helper.from_array(steps, "steps"),
            numpy_helper.from_array(rng.normal(size=(HIDDEN, width)).astype(np.float32), "widen"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("DequantizeLinear", ["codes", "steps"], ["head"], axis=0, block_size=block),
            helper.make_node("MatMul", ["inputs_embeds", "widen"], ["wide"]),
            helper.make_node("MatMul", ["wide", "head"], ["head_logits"]),
            helper.make_node("Mul", ["plain", "zero"], ["nothing"]),
            helper.make_node("Add", ["head_logits", "nothing"], ["logits"]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    onnx.save(model, copy / "decoder/model.onnx")
    engine = OrtReferenceEngine(copy, manifest, EngineOptions(threads=1, graph_optimization=level))
    embeds = rng.normal(size=(1, 3, HIDDEN)).astype(np.float32)
    got = engine.start().prefill(embeds, np.ones((1, 3), np.int64), np.arange(3)[None])
    widen = numpy_helper.to_array(next(t for t in graph.initializer if t.name == "widen"))
    expected = embeds[0].astype(np.float64) @ widen @ (codes * np.repeat(steps, block, axis=0).astype(np.float64))
    # float32 products of length 64; rounding the activations to 8 bits would be off by 5e-3 of the largest
    np.testing.assert_allclose(got[0], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "match"), [({"threads": 0}, "threads is 0"), ({"graph_optimization": "most"}, "disable, basic")]
)
def test_options_out_of_range(bundle, manifest, options, match):
    with pytest.raises(InputError, match=match):
        OrtReferenceEngine(bundle, manifest, EngineOptions(**options))


def check_broken(folder, manifest, match):
    with pytest.raises(BundleError, match=match) as caught:
        OrtReferenceEngine(folder, manifest, OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vision_encoder", "embedding", "decoder"])
def test_missing_and_damaged_graphs(copy, manifest, name, capfd):
    path = copy / name / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    check_broken(copy, manifest, f"{name}/model.onnx cannot be opened")
    path.unlink()
    check_broken(copy, manifest, f"{name}/model.onnx is missing")
    assert capfd.readouterr().err == ""


def test_missing_and_truncated_external_data(copy, manifest):
    path = copy / "embedding/model.onnx"
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=400)
    OrtReferenceEngine(copy, manifest, OPTIONS)
    data = copy / "embedding/model.onnx.data"
    data.write_bytes(data.read_bytes()[:-40])
    check_broken(copy, manifest, "embedding/model.onnx cannot be opened")
    data.unlink()
    check_broken(copy, manifest, "embedding/model.onnx cannot be opened")


def test_graph_that_breaks_the_contract(copy, manifest):
    shutil.copy(copy / "vision_encoder/model.onnx", copy / "embedding/model.onnx")
    check_broken(copy, manifest, "not have the inputs and outputs of a embedding .*pixel_values")


def test_decoder_with_other_layers_than_the_manifest_says(bundle, manifest):
    wrong = dataclasses.replace(manifest, decoder=dataclasses.replace(manifest.decoder, num_layers=2))
    check_broken(bundle, wrong, r"past_key_values\.1\.key")


@pytest.mark.parametrize("file", ["../outside.onnx", "/etc/passwd", "decoder/../../x.onnx"])
def test_component_outside_the_bundle(bundle, manifest, file):
    components = dict(manifest.components)
    components["decoder"] = dataclasses.replace(components["decoder"], file=file)
    check_broken(bundle, dataclasses.replace(manifest, components=components), "outside the bundle")


def test_missing_component(bundle, manifest):
    components = {name: value for name, value in manifest.components.items() if name != "decoder"}
    check_broken(bundle, dataclasses.replace(manifest, components=components), "no component 'decoder'")


def test_failure_at_run_time_is_one_line(engine, capfd):
    with pytest.raises(QavpError, match="failed in the vision_encoder") as caught:
        engine.encode_images({"pixel_values": np.zeros((1, 3, 5, 7), np.float32)})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_values_follow_the_contracts_types(engine):
    session = engine.start()
    logits = session.prefill(
        engine.embed(np.array([[5]], np.int32), no_images()), np.ones((1, 1), np.int32), np.zeros((1, 1), np.int32)
    )
    assert logits.dtype == np.float32


@pytest.mark.parametrize("placeholders", [AFTER - 1, AFTER + 1])
def test_placeholders_that_do_not_match_the_features_state_both(engine, placeholders):
    ids = np.full((1, placeholders), IMAGE, np.int64)
    features = np.zeros((1, AFTER, HIDDEN), np.float32)
    with pytest.raises(PromptError, match=f"{placeholders} image placeholders and the images {AFTER} features"):
        engine.embed(ids, features)


@pytest.fixture(scope="module")
def typed(bundle, tmp_path_factory):
    """The tiny bundle with a decoder that adds 100 to the logits of vision tokens."""
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("typed") / "bundle")
    model = onnx.load(folder / "decoder/model.onnx")
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, ["B", "S"]))
    (last,) = [node for node in graph.node if "logits" in node.output]
    last.output[0] = "plain_logits"
    graph.initializer.append(numpy_helper.from_array(np.array(100, np.float32), "hundred"))
    graph.node.extend(
        [
            helper.make_node("Cast", ["token_type_ids"], ["types"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["types", "hundred"], ["raised"]),
            helper.make_node("Unsqueeze", ["raised", "last"], ["raised_column"]),
            helper.make_node("Add", ["plain_logits", "raised_column"], ["logits"]),
        ]
    )
    onnx.save(model, folder / "decoder/model.onnx")
    manifest = Manifest.read(folder)
    decoder = manifest.components["decoder"]
    inputs = [*decoder.inputs, TensorSpec("token_type_ids", "INT64", ["B", "S"])]
    manifest.components["decoder"] = dataclasses.replace(decoder, inputs=inputs)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def test_decoder_that_takes_token_types(typed, engine):
    ids, ones, positions = np.array([[5, 9, 11]]), np.ones((1, 3), np.int64), np.arange(3)[None]
    embeds = engine.embed(ids, no_images())
    plain, raised = engine.start(), OrtReferenceEngine(typed, Manifest.read(typed), OPTIONS).start()
    expected = plain.prefill(embeds, ones, positions)
    types = np.array([[0, 1, 1]])
    # 100 has 5 bits less for the fraction than the logits
    np.testing.assert_allclose(
        raised.prefill(embeds, ones, positions, types), expected + 100 * types[..., None], atol=1e-5
    )
    step = np.array([[7]]), np.ones((1, 4), np.int64), np.array([[3]])
    np.testing.assert_array_equal(raised.decode(*step), plain.decode(*step))
    np.testing.assert_array_equal(raised.prefill(embeds, ones, positions), expected)


def test_model_tells_such_a_decoder_which_tokens_are_an_images(bundle, typed):
    picture = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    plain, raised = (QavpModel.from_bundle(folder, "ort-reference", OPTIONS) for folder in (bundle, typed))
    prepared = plain.prepare([picture, None], ["w0", "w1 w2 w3"])
    shift = raised.logits([picture, None], ["w0", "w1 w2 w3"]) - plain.logits([picture, None], ["w0", "w1 w2 w3"])
    # differences of 100 and of 0, with the rounding of numbers above 100
    np.testing.assert_allclose(shift[..., 0], 100 * (prepared.input_ids == IMAGE), atol=1e-4)
    ids = raised.generate_ids(picture, "w0 w3", max_new_tokens=6)
    assert ids == plain.generate_ids(picture, "w0 w3", max_new_tokens=6)


@pytest.mark.parametrize(
    "options", [EngineOptions(vision="w8a8"), EngineOptions(cpu_memory="low"), EngineOptions(kv_cache="int8")]
)
def test_options_of_other_engines_are_refused(bundle, manifest, options):
    with pytest.raises(
        InputError, match="runs the canonical graphs as they are; leave vision, cpu_memory and kv_cache out"
    ):
        load_engine("ort-reference", bundle, manifest, options)
