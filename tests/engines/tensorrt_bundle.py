"""The hand-made bundle with engines: what `fake_tensorrt` runs in place of TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qavp_export.engines import Engine, EngineOptions, load_engine
from qavp_export.engines.tensorrt.keys import IN_PLACE, EngineKeys, GraphKeys, Profiles, engine_folder
from qavp_export.manifest import Manifest
from tests.engines.fake_cuda import FakeDevice
from tests.engines.fake_tensorrt import VERSION, FakeTensorRt, Profile, save_engine
from tests.runtime.tiny_bundle import AFTER, HIDDEN, VOCAB, make_weights

FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
MAX_BATCH, MAX_PROMPT, MAX_IMAGES = 4, 48, 3
# Least and largest.
GROWING, FIXED = (64, 192), (96, 96)
PAST = ("past_key_values.0.key", "past_key_values.0.value")
KEEP = "keep_tokens"
PRESENT = ("present.0.key", "present.0.value")


@dataclass(frozen=True)
class Fake:
    """A machine with the fake library.

    Attributes:
        bundle: A bundle with engines for it.
        device: Its GPU.
        trt: The library.
    """

    bundle: Path
    device: FakeDevice
    trt: FakeTensorRt

    def open(self, flavour: str = "tensorrt") -> Engine:
        """Opens the engines."""
        return load_engine(flavour, self.bundle, Manifest.read(self.bundle), EngineOptions())


Install = Callable[..., Fake]


def prompts(lengths: tuple[int, ...], seed: int = 1) -> tuple[Any, Any, Any]:
    """Embeddings, mask and positions of a batch that is padded on the left."""
    rng = np.random.default_rng(seed)
    longest = max(lengths)
    mask = np.stack([np.arange(longest) >= longest - length for length in lengths]).astype(np.int64)
    embeds = rng.standard_normal((*mask.shape, HIDDEN)).astype(np.float32)
    return embeds, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)


def steps_of(session: Any, mask: Any, positions: Any, tokens: Any) -> Iterator[Any]:
    """Gives an answer token by token; yields the logits behind each."""
    positions = positions[:, -1:]
    for token in tokens.T:
        mask, positions = np.pad(mask, ((0, 0), (0, 1)), constant_values=1), positions + 1
        yield session.decode(token[:, None], mask, positions)


def tokens_of(rows: int, steps: int) -> Any:
    return np.random.default_rng(steps).integers(7, VOCAB, (rows, steps))


def add_engines(
    bundle: Path,
    flavour: str,
    *,
    capacity: tuple[int, int] = GROWING,
    cache: int = HALF,
    typed: bool = False,
    keep: bool = False,
    capabilities: Sequence[int] = (89,),
) -> EngineKeys:
    """Writes engines into a bundle of `tiny_bundle`.

    Args:
        bundle: The bundle.
        flavour: `tensorrt` or `tensorrt-rtx`.
        capacity: Least and largest number of tokens of the cache.
        cache: Type of keys and values.
        typed: Whether the decoder takes `token_type_ids` and `attention_mask`; a vision token counts twice, and a value
            of padding is nothing.
        keep: Whether the vision encoder takes `keep_tokens`, on the host.
        capabilities: What the keys say.
    """
    folder = bundle / engine_folder(flavour)
    folder.mkdir(parents=True)
    encoder = onnx.load(bundle / "vision_encoder" / "model.onnx")
    vision: Profile = {"pixel_values": ([1, 3, 4, 4], [MAX_IMAGES, 3, 4, 4])}
    if keep:
        _choose_at_run_time(encoder)
    embedding: Profile = {
        "input_ids": ([1, 1], [MAX_BATCH, MAX_PROMPT]),
        # TensorRT's profiles need not begin at nothing.
        "image_features": ([1, AFTER, HIDDEN], [MAX_BATCH * MAX_IMAGES, AFTER, HIDDEN]),
    }
    decoder = decoder_engine(cache, typed=typed)
    models = {
        "vision_encoder": (encoder, [vision]),
        "embedding": (onnx.load(bundle / "embedding" / "model.onnx"), [embedding]),
        "decoder": (decoder, [_profile(decoder, tokens, capacity) for tokens in (MAX_PROMPT, 1)]),
    }
    graphs = {}
    for name, (model, profiles) in models.items():
        path = folder / f"{name}.engine"
        aliases = dict(zip(PRESENT, PAST, strict=True)) if name == "decoder" else None
        save_engine(model, path, profiles, aliases, {KEEP: "k"} if keep and name == "vision_encoder" else None)
        inputs, outputs = (tuple(value.name for value in values) for values in (model.graph.input, model.graph.output))
        graphs[name] = GraphKeys.of(path, inputs, outputs, {"layer": "fp16"}, {"layer": "fp16"})
    driver = 13000 if flavour == "tensorrt" else None
    profiles_of = Profiles(MAX_PROMPT, capacity[1], MAX_BATCH)
    keys = EngineKeys(flavour, VERSION, tuple(capabilities), driver, profiles_of, IN_PLACE, graphs)
    keys.write(folder)
    return keys


def _choose_at_run_time(encoder: onnx.ModelProto) -> None:
    """Makes the number of tokens that survive an input."""
    graph = encoder.graph
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == "k"))
    for node in graph.node:
        node.input[:] = [KEEP if name == "k" else name for name in node.input]
    graph.input.append(helper.make_tensor_value_info(KEEP, INT, [1]))
    for value in graph.output:
        value.type.tensor_type.shape.dim[1].dim_param = "k"


def _profile(decoder: onnx.ModelProto, tokens: int, capacity: tuple[int, int]) -> Profile:
    least, most = {}, {}
    for which, found in ((0, least), (1, most)):
        sizes = {"B": (1, MAX_BATCH)[which], "S": (1, tokens)[which], "R": (1, tokens)[which], "T": capacity[which]}
        for value in decoder.graph.input:
            dims = value.type.tensor_type.shape.dim
            found[value.name] = [sizes.get(dim.dim_param, dim.dim_value) for dim in dims]
    return {name: (least[name], most[name]) for name in least}


def decoder_engine(cache: int, *, typed: bool) -> onnx.ModelProto:
    """Returns the decoder of `tiny_bundle` as an engine has it: on a cache that it writes into."""
    tensors = ["B", 1, "T", HIDDEN]
    inputs = [
        ("inputs_embeds", FLOAT, ["B", "S", HIDDEN]),
        ("position_ids", INT, ["B", "S"]),
        ("write_indices", INT, ["B"]),
        ("logit_positions", INT, ["B", "R"]),
        *((name, cache, tensors) for name in PAST),
        *([("token_type_ids", INT, ["B", "S"]), ("attention_mask", INT, ["B", "S"])] if typed else []),
    ]
    outputs = [("logits", FLOAT, ["B", "R", VOCAB]), *((name, cache, tensors) for name in PRESENT)]
    graph = helper.make_graph(
        [*_new(typed=typed), *_places(), *_attention(cache)],
        "decoder",
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(*spec) for spec in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in _constants().items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


def _constants() -> dict[str, Any]:
    weights = make_weights()
    floats = {"ten": np.array(10, np.float32), "one": np.array(1, np.float32), "w": weights.w, "u": weights.u}
    ints = {"zero": 0, "step": 1, "last": [-1], "axis": [1], "head_and_channel": [1, 3], "row": [1, 1, HIDDEN]}
    return {**floats, **{name: np.array(value, np.int64) for name, value in ints.items()}}


def _new(*, typed: bool) -> list[onnx.NodeProto]:
    """Keys are embeddings, values embeddings * (1 + position / 10), `[B,1,S,D]`."""
    node = helper.make_node
    nodes = [
        node("Cast", ["position_ids"], ["position"], to=FLOAT),
        node("Div", ["position", "ten"], ["tenth"]),
        node("Add", ["tenth", "one"], ["factor_row"]),
        node("Unsqueeze", ["factor_row", "last"], ["factor"]),
        node("Mul", ["inputs_embeds", "factor"], ["untyped" if typed else "values"]),
    ]
    if typed:
        nodes += [
            node("Cast", ["token_type_ids"], ["kind"], to=FLOAT),
            node("Add", ["kind", "one"], ["times"]),
            node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
            node("Mul", ["times", "mask"], ["times_row"]),
            node("Unsqueeze", ["times_row", "last"], ["times_column"]),
            node("Mul", ["untyped", "times_column"], ["values"]),
        ]
    return [
        *nodes,
        node("Unsqueeze", ["inputs_embeds", "axis"], ["new_key"]),
        node("Unsqueeze", ["values", "axis"], ["new_value"]),
    ]


def _places() -> list[onnx.NodeProto]:
    """Where each token goes, `[B,1,S,D]`, and that it sees what is not behind it, `[B,S,T]`."""
    node = helper.make_node
    return [
        node("Shape", ["position_ids"], ["length_list"], start=1, end=2),
        node("Squeeze", ["length_list"], ["length"]),
        node("Range", ["zero", "length", "step"], ["columns"]),
        node("Unsqueeze", ["write_indices", "axis"], ["written"]),
        node("Add", ["written", "columns"], ["places"]),
        node("Shape", [PAST[0]], ["capacity_list"], start=2, end=3),
        node("Squeeze", ["capacity_list"], ["capacity"]),
        node("Range", ["zero", "capacity", "step"], ["cells"]),
        node("Unsqueeze", ["places", "last"], ["places_column"]),
        node("LessOrEqual", ["cells", "places_column"], ["seen"]),
        node("Cast", ["seen"], ["visible"], to=FLOAT),
        node("Unsqueeze", ["places", "head_and_channel"], ["index"]),
        node("Shape", ["new_key"], ["new_shape"]),
        node("Expand", ["index", "new_shape"], ["index_of_all"]),
    ]


def _attention(cache: int) -> list[onnx.NodeProto]:
    """Writes into the cache, sums what each token sees of it, and makes logits of the sums."""
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["logit_positions", "last"], ["wanted"]),
        node("Expand", ["wanted", "row"], ["wanted_of_all"]),
    ]
    for kind, function, matrix in (("value", "Sin", "w"), ("key", "Cos", "u")):
        past, present = f"past_key_values.0.{kind}", f"present.0.{kind}"
        nodes += [
            node("Cast", [f"new_{kind}"], [f"half_{kind}"], to=cache),
            node("ScatterElements", [past, "index_of_all", f"half_{kind}"], [present], axis=2),
            node("Squeeze", [present, "axis"], [f"stored_{kind}"]),
            node("Cast", [f"stored_{kind}"], [f"full_{kind}"], to=FLOAT),
            node("MatMul", ["visible", f"full_{kind}"], [f"sum_{kind}"]),
            node("GatherElements", [f"sum_{kind}", "wanted_of_all"], [f"flat_{kind}"], axis=1),
            node(function, [f"flat_{kind}"], [f"wave_{kind}"]),
            node("MatMul", [f"wave_{kind}", matrix], [f"logits_{kind}"]),
        ]
    return [*nodes, node("Add", ["logits_value", "logits_key"], ["logits"])]
