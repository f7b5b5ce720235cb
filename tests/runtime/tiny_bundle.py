"""A bundle built by hand whose answers NumPy can predict: tiny graphs that follow the component contract.

Vision encoder: 2x2 average pooling of a 4x4 picture gives 4 tokens; the 2 with the largest channel sum survive in
raster order. Embedding: a table. Decoder: key = embedding, value = embedding * (1 + position / 10); the logits are
sin(sum of visible values) @ W + cos(sum of visible keys) @ U, so that every id depends on all tokens before it, on
their positions, on the mask and on both halves of the cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qavp_export.manifest import MANIFEST_NAME, Component, DecoderSpec, Manifest, TensorSpec, VisionTokens

BEFORE, AFTER, HIDDEN = 4, 2, 3
SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<unk>", "USER:", "ASSISTANT:"]
WORDS = SPECIAL + [f"w{index}" for index in range(33)]
PAD, BOS, EOS, IMAGE, UNK, USER, ASSISTANT = range(7)
VOCAB = len(WORDS)
CONTEXT = 24
MEAN, STD = 0.5, 0.25
TEMPLATE = (
    "{{ bos_token }} USER: {% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"
)
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


@dataclass(frozen=True)
class Weights:
    """The numbers of the tiny model."""

    table: NDArray[np.float32]
    w: NDArray[np.float32]
    u: NDArray[np.float32]


def make_weights() -> Weights:
    rng = np.random.default_rng(7)
    return Weights(
        table=rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32),
        w=rng.normal(size=(HIDDEN, VOCAB)).astype(np.float32),
        u=rng.normal(size=(HIDDEN, VOCAB)).astype(np.float32),
    )


def write_bundle(folder: Path, positions: str = "contiguous", chat_template: str | None = TEMPLATE) -> Path:
    """Writes the whole bundle."""
    weights = make_weights()
    graphs = {
        "vision_encoder": _vision_encoder(),
        "embedding": _embedding(weights),
        "decoder": _decoder(weights),
    }
    components = {}
    for name, model in graphs.items():
        onnx.checker.check_model(model, full_check=True)
        (folder / name).mkdir(parents=True)
        onnx.save(model, folder / name / "model.onnx")
        components[name] = Component(f"{name}/model.onnx", _specs(model.graph.input), _specs(model.graph.output))
    _write_processors(folder, chat_template)
    manifest = Manifest(
        source="tiny",
        family="tiny",
        recipe={},
        vision_tokens=VisionTokens(BEFORE, AFTER, "<image>", IMAGE, positions, keep=AFTER / BEFORE),
        decoder=DecoderSpec(1, 1, HIDDEN, HIDDEN, VOCAB, CONTEXT, [EOS], PAD),
        components=components,
        precision={},
        weight_error={},
        notes=[],
        calibration=None,
        checkpoint_bytes=0,
        checkpoint_quantization=None,
        parity={},
        versions={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def _specs(values: list[onnx.ValueInfoProto]) -> list[TensorSpec]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        specs.append(TensorSpec(value.name, TensorProto.DataType.Name(tensor.elem_type), shape))
    return specs


def _model(name: str, nodes: list, inputs: list, outputs: list, constants: dict) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(*spec) for spec in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _vision_encoder() -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["pooled", "grid"], ["channels_first"]),
        node("Transpose", ["channels_first"], ["tokens"], perm=[0, 2, 1]),
        node("ReduceSum", ["tokens", "last"], ["score"], keepdims=0),
        node("TopK", ["score", "k"], ["best", "unsorted"], axis=1),
        node("TopK", ["unsorted", "k"], ["kept_indices", "order"], axis=1, largest=0),
        node("Unsqueeze", ["kept_indices", "last"], ["column"]),
        node("Expand", ["column", "row"], ["index"]),
        node("GatherElements", ["tokens", "index"], ["image_features"], axis=1),
    ]
    ints = {"grid": [0, HIDDEN, BEFORE], "last": [2], "k": [AFTER], "row": [1, 1, HIDDEN]}
    constants = {key: np.array(value, np.int64) for key, value in ints.items()}
    constants["last"] = np.array([-1], np.int64)
    return _model(
        "vision_encoder",
        nodes,
        [("pixel_values", FLOAT, ["B", 3, 4, 4])],
        [("image_features", FLOAT, ["B", AFTER, HIDDEN]), ("kept_indices", INT, ["B", AFTER])],
        constants,
    )


def _embedding(weights: Weights) -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("Equal", ["input_ids", "image"], ["is_image"]),
        node("Reshape", ["is_image", "flat"], ["is_image_flat"]),
        node("Cast", ["is_image_flat"], ["ones"], to=INT),
        node("CumSum", ["ones", "axis"], ["count"]),
        node("Sub", ["count", "ones"], ["before"]),
        node("Mul", ["before", "ones"], ["rank"]),
        node("Reshape", ["image_features", "rows"], ["features"]),
        node("Concat", ["features", "spare"], ["source"], axis=0),
        node("Gather", ["source", "rank"], ["picked_flat"]),
        node("Gather", ["table", "input_ids"], ["words"]),
        node("Shape", ["words"], ["shape"]),
        node("Reshape", ["picked_flat", "shape"], ["picked"]),
        node("Unsqueeze", ["is_image", "last"], ["mask"]),
        node("Where", ["mask", "picked", "words"], ["inputs_embeds"]),
    ]
    constants = {
        "image": np.array(IMAGE, np.int64),
        "flat": np.array([-1], np.int64),
        "axis": np.array(0, np.int64),
        "rows": np.array([-1, HIDDEN], np.int64),
        "spare": np.zeros((1, HIDDEN), np.float32),
        "table": weights.table,
        "last": np.array([-1], np.int64),
    }
    return _model(
        "embedding",
        nodes,
        [("input_ids", INT, ["B", "S"]), ("image_features", FLOAT, ["I", AFTER, HIDDEN])],
        [("inputs_embeds", FLOAT, ["B", "S", HIDDEN])],
        constants,
    )


def _decoder(weights: Weights) -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("Cast", ["position_ids"], ["position"], to=FLOAT),
        node("Div", ["position", "ten"], ["tenth"]),
        node("Add", ["tenth", "one"], ["factor_row"]),
        node("Unsqueeze", ["factor_row", "last"], ["factor"]),
        node("Mul", ["inputs_embeds", "factor"], ["values"]),
        node("Unsqueeze", ["inputs_embeds", "heads"], ["new_key"]),
        node("Unsqueeze", ["values", "heads"], ["new_value"]),
        node("Concat", ["past_key_values.0.key", "new_key"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "new_value"], ["present.0.value"], axis=2),
        node("Cast", ["attention_mask"], ["visible_row"], to=FLOAT),
        node("Unsqueeze", ["visible_row", "head_and_channel"], ["visible"]),
        node("Shape", ["position_ids"], ["length"], start=1, end=2),
        node("Neg", ["length"], ["first"]),
    ]
    for kind, function, matrix in (("value", "Sin", "w"), ("key", "Cos", "u")):
        nodes += [
            node("Mul", [f"present.0.{kind}", "visible"], [f"masked_{kind}"]),
            node("CumSum", [f"masked_{kind}", "sequence"], [f"sums_{kind}"]),
            node("Slice", [f"sums_{kind}", "first", "end", "sequence_list"], [f"sum_{kind}"]),
            node("Squeeze", [f"sum_{kind}", "heads"], [f"flat_{kind}"]),
            node(function, [f"flat_{kind}"], [f"wave_{kind}"]),
            node("MatMul", [f"wave_{kind}", matrix], [f"logits_{kind}"]),
        ]
    nodes.append(node("Add", ["logits_value", "logits_key"], ["logits"]))
    constants = {
        "ten": np.array(10, np.float32),
        "one": np.array(1, np.float32),
        "last": np.array([-1], np.int64),
        "heads": np.array([1], np.int64),
        "head_and_channel": np.array([1, 3], np.int64),
        "sequence": np.array(2, np.int64),
        "sequence_list": np.array([2], np.int64),
        "end": np.array([2**31], np.int64),
        "w": weights.w,
        "u": weights.u,
    }
    cache = ["B", 1, "past", HIDDEN]
    inputs = [
        ("inputs_embeds", FLOAT, ["B", "S", HIDDEN]),
        ("attention_mask", INT, ["B", "total"]),
        ("position_ids", INT, ["B", "S"]),
        ("past_key_values.0.key", FLOAT, cache),
        ("past_key_values.0.value", FLOAT, cache),
    ]
    present = ["B", 1, "total", HIDDEN]
    outputs = [
        ("logits", FLOAT, ["B", "S", VOCAB]),
        ("present.0.key", FLOAT, present),
        ("present.0.value", FLOAT, present),
    ]
    return _model("decoder", nodes, inputs, outputs, constants)


def _write_processors(folder: Path, chat_template: str | None) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    size = {"height": 4, "width": 4}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": size,
        "do_center_crop": False,
        "crop_size": size,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "resample": 3,
    }
    # As in older checkpoints, the processor's own settings are not there: the model's configuration tells.
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image_processor}))
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model", "patch_size": 2}}
    (folder / "config.json").write_text(json.dumps(config))


def reference_features(picture: NDArray[np.uint8]) -> tuple[NDArray[np.float64], list[int]]:
    """Surviving tokens and their raster positions for one 4x4 RGB picture."""
    pixels = (picture / 255.0 - MEAN) / STD
    cells = pixels.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3)).reshape(BEFORE, 3)
    kept = sorted(sorted(range(BEFORE), key=lambda index: -cells[index].sum())[:AFTER])
    return cells[kept], kept


def reference_logits(embeds: NDArray[np.float64], positions: list[int]) -> NDArray[np.float64]:
    """Logits after the last token of one sequence, from the definition: no cache, no padding, no batch."""
    weights = make_weights()
    values = embeds * (1 + np.array(positions)[:, None] / 10)
    return np.sin(values.sum(axis=0)) @ weights.w + np.cos(embeds.sum(axis=0)) @ weights.u


def reference_answer(words: list[int | NDArray[np.uint8]], new_tokens: int, original: bool = False) -> list[int]:
    """Greedy ids for one prompt given as ids and 4x4 pictures, each computed from scratch."""
    weights = make_weights()
    embeds: list[NDArray[np.float64]] = []
    positions: list[int] = []
    following = 0
    for word in words:
        if isinstance(word, int):
            embeds.append(weights.table[word].astype(np.float64))
            positions.append(following)
            following += 1
        else:
            features, kept = reference_features(word)
            embeds.extend(features)
            positions.extend(following + index for index in (kept if original else range(AFTER)))
            following += BEFORE if original else AFTER
    answer: list[int] = []
    while len(answer) < new_tokens and following < CONTEXT:
        scores = reference_logits(np.array(embeds), positions)
        scores[IMAGE] = -np.inf
        best, second = np.argsort(-scores)[:2]
        # Float32 graphs must not be able to choose otherwise; if this fails, change the test's prompt.
        assert scores[best] - scores[second] > 1e-4
        answer.append(int(best))
        if best == EOS:
            break
        embeds.append(weights.table[best].astype(np.float64))
        positions.append(following)
        following += 1
    return answer
