"""Traces a model's components to ONNX graphs whose weights have names and shapes and no data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import onnxscript.rewriter.onnx_fusions
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qavp_export.families.base import BATCH, PAST, SEQUENCE, Family, GraphInput, Plan
from qavp_export.passes.relevance import TOKEN_RELEVANCE
from qavp_export.tracing.naming import CLIP, PARAMETER, ReadableNames

# Opset 24 makes the exporter decompose RMSNorm and RoPE.
OPSET = 23

# A parameter's name in the Hugging Face model and its shape -> its tensor.
WeightSource = Callable[[str, tuple[int, ...]], ir.TensorProtocol]


@dataclass(frozen=True)
class _Request:
    """One export: sample arguments, names of the flattened inputs and outputs, and their dynamic axes."""

    module: nn.Module
    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]


def trace_components(
    family: Family,
    plan: Plan,
    model: nn.Module,
    mode: FakeTensorMode,
    weights: WeightSource,
    progress: Callable[[int, int], None],
    clip: nn.Module | None = None,
) -> dict[str, ir.Model]:
    """Traces vision encoder, embedding and decoder.

    Args:
        family: The model's family.
        plan: The model's sizes.
        model: What `build_skeleton` returned.
        mode: The fake tensor mode of the model's parameters.
        weights: Gives the tensor that a parameter's name and shape stand for; a lazy one is not evaluated here.
        progress: Called with the number of components traced, and how many there are.
        clip: For the scorer `text`, what `build_clip_skeleton` returned in the same mode: the vision encoder then has
            the input `text_input_ids`. The names of its parameters begin with "clip.".

    Returns:
        The graphs by component name, opset 23. Parameters are initializers that carry the parameter's name in
        `metadata_props[PARAMETER]`. Batch, sequence and past are dynamic; what of the images is, the family says.
        Where tokens are not the tower's patches, the vision encoder has the input `patch_relevance` and the output
        `token_relevance`, which the pruning passes consume (`Family.relevance_input`); with `clip` it has that output.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    if clip is not None:
        modules |= {id(module): name for name, module in clip.named_modules(prefix=CLIP)}
    with mode:
        vision = family.vision_encoder(model) if clip is None else family.question_encoder(model, clip)
        requests = {
            "vision_encoder": _vision_request(family, vision, plan, reads_question=clip is not None),
            "embedding": _embedding_request(family.embedding(model), plan),
            "decoder": _decoder_request(family.decoder(model), plan, family.decoder_inputs(plan)),
        }
    graphs = {}
    for number, (component, request) in enumerate(requests.items()):
        progress(number, len(requests))
        graphs[component] = _trace(request, mode, modules, weights)
    return graphs


def _vision_request(family: Family, module: nn.Module, plan: Plan, *, reads_question: bool = False) -> _Request:
    relevance = family.question_input() if reads_question else family.relevance_input(plan)
    given = (*family.vision_inputs(plan), *([] if relevance is None else [relevance]))
    images: int | str = "batch" if family.layout == "grid" else 1
    tokens: int | str = "tokens" if plan.vision_tokens is None else plan.vision_tokens
    outputs: dict[str, tuple[int | str, ...]] = {"image_features": (images, tokens, plan.hidden_size)}
    if relevance is not None:
        outputs[TOKEN_RELEVANCE] = (images, tokens)
    return _Request(
        module=module,
        args=_samples(given),
        dynamic_shapes=_dynamic_axes(given),
        inputs={value.name: value.shape for value in given},
        outputs=outputs,
    )


def _samples(inputs: Sequence[GraphInput]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(value.sample, dtype=value.dtype) for value in inputs)


def _dynamic_axes(inputs: Sequence[GraphInput]) -> tuple[dict[int, str], ...]:
    return tuple({axis: size for axis, size in enumerate(value.shape) if isinstance(size, str)} for value in inputs)


def _embedding_request(module: nn.Module, plan: Plan) -> _Request:
    return _Request(
        module=module,
        args=(
            torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
            torch.zeros(BATCH + 2, SEQUENCE + 4, plan.hidden_size),
        ),
        dynamic_shapes=({0: "batch", 1: "sequence"}, {0: "images", 1: "tokens_per_image"}),
        inputs={
            "input_ids": ("batch", "sequence"),
            "image_features": ("images", "tokens_per_image", plan.hidden_size),
        },
        outputs={"inputs_embeds": ("batch", "sequence", plan.hidden_size)},
    )


def _decoder_request(module: nn.Module, plan: Plan, more: Sequence[GraphInput]) -> _Request:
    past_shape = (BATCH, plan.num_key_value_heads, PAST, plan.head_dim)
    past = [(torch.zeros(past_shape), torch.zeros(past_shape)) for _ in range(plan.num_layers)]
    inputs: dict[str, tuple[int | str, ...]] = {
        "inputs_embeds": ("batch", "sequence", plan.hidden_size),
        "attention_mask": ("batch", "total"),
        "position_ids": ("batch", "sequence"),
        **{value.name: value.shape for value in more},
    }
    outputs: dict[str, tuple[int | str, ...]] = {"logits": ("batch", "sequence", plan.vocab_size)}
    for layer in range(plan.num_layers):
        for part in ("key", "value"):
            heads, channels = plan.num_key_value_heads, plan.head_dim
            inputs[f"past_key_values.{layer}.{part}"] = ("batch", heads, "past", channels)
            outputs[f"present.{layer}.{part}"] = ("batch", heads, "total", channels)
    token_axes = {0: "batch", 1: "sequence"}
    past_axes = {0: "batch", 2: "past"}
    return _Request(
        module=module,
        args=(
            torch.zeros(BATCH, SEQUENCE, plan.hidden_size),
            torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64),
            torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),
            *_samples(more),
            past,
        ),
        dynamic_shapes=(
            token_axes,
            {0: "batch", 1: "total"},
            token_axes,
            *_dynamic_axes(more),
            [(past_axes, past_axes) for _ in range(plan.num_layers)],
        ),
        inputs=inputs,
        outputs=outputs,
    )


def _trace(request: _Request, mode: FakeTensorMode, modules: Mapping[int, str], weights: WeightSource) -> ir.Model:
    # Found through the owning module, not the tensor: tied parameters are one tensor with two names.
    by_local_name = {
        f"{local}.{leaf}" if local else leaf: f"{modules[id(module)]}.{leaf}".lstrip(".")
        for local, module in request.module.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    with mode, torch.no_grad(), _quiet():
        program = torch.onnx.export(
            request.module.eval(),
            request.args,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            dynamic_shapes=request.dynamic_shapes,
            input_names=list(request.inputs),
            output_names=list(request.outputs),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model
    _simplify(model, by_local_name, weights)
    _set_shapes(model.graph.inputs, request.inputs)
    _set_shapes(model.graph.outputs, request.outputs)
    ReadableNames()(model)
    return model


def _simplify(model: ir.Model, parameter_names: Mapping[str, str], weights: WeightSource) -> None:
    """Folds constants and fuses norms and rotary embeddings without touching a parameter."""
    graph = model.graph
    fake = [
        value
        for value in graph.initializers.values()
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor)
    ]
    # As graph inputs, parameters have no value that an optimizer could fold, transpose or merge.
    for value in fake:
        graph.initializers.pop(value.name)  # type: ignore[arg-type]
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize_ir(model)
    onnxscript.rewriter.onnx_fusions.fuse(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    for value in fake:
        graph.inputs.remove(value)
        if value.uses():
            parameter = parameter_names[str(value.name)]
            value.metadata_props[PARAMETER] = parameter
            value.const_value = weights(parameter, value.shape.numpy() if value.shape is not None else ())
            graph.register_initializer(value)


def _set_shapes(values: Any, shapes: Mapping[str, tuple[int | str, ...]]) -> None:
    for value, (name, shape) in zip(values, shapes.items(), strict=True):
        if value.name != name:
            raise RuntimeError(f"the exporter named {name} {value.name}")
        value.shape = ir.Shape(shape)


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter reports missing optional packages and its own deprecations: nothing a user can act on.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
