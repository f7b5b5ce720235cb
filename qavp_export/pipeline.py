"""The main job: a checkpoint becomes a bundle. Read top to bottom; every step is one call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from qavp_export.bundle import BundleWriter
from qavp_export.calibration import CalibrationSet, demo_calibration, read_calibration
from qavp_export.calibration.prompts import embed_prompts, embed_text
from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import BundleError, CheckpointError, ParityError, RecipeError
from qavp_export.families import Family, Plan, family_for
from qavp_export.manifest import DecoderSpec, Manifest, VisionTokens
from qavp_export.parity import check_parity
from qavp_export.passes import (
    FoldWeightTransposes,
    KeepAllTokens,
    PruneVisionTokens,
    StoreHalf,
    realized_precision,
)
from qavp_export.quantization import Calibration, Quantization, quantize
from qavp_export.recipe import Recipe
from qavp_export.runtime.processors import load_processors
from qavp_export.settings import Settings, settle
from qavp_export.tracing import PARAMETER, build_skeleton, trace_components
from qavp_export.weights import CheckpointWeights

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# Sequences that stand for whatever begins a prompt, and their length.
_OPENINGS = (8, 4)
_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class Source:
    """A checkpoint that was opened and understood; no weight has been read.

    Attributes:
        name: The model as the user named it.
        checkpoint: The open checkpoint.
        config: The Hugging Face configuration.
        family: The model's family.
        plan: The model's sizes.
        tokenizer: The checkpoint's tokenizer.
    """

    name: str
    checkpoint: Checkpoint
    config: Any
    family: Family
    plan: Plan
    tokenizer: Any


def export(
    folder: Path,
    recipe: Recipe,
    target: Path,
    *,
    name: str,
    force: bool,
    progress: Progress,
    calibration_data: Path | None = None,
) -> Manifest:
    """Exports a checkpoint folder as a bundle.

    Args:
        folder: The checkpoint folder.
        recipe: What to do.
        target: The bundle's folder; it appears complete or not at all.
        name: The model as the user named it.
        force: Replace an existing bundle.
        progress: Called as the work goes on.
        calibration_data: Image prompts for recipes that need them, see `read_calibration`; None takes the demo's.

    Returns:
        The bundle's manifest.

    Raises:
        QavpError: Bad input, an unavailable target, a failed parity check; see the subclasses.
    """
    source = open_source(folder, name)
    settings = settle(recipe, source.family, source.plan)
    drawn = draw_prompts(recipe, calibration_data)
    with BundleWriter(target, force=force) as writer:
        writer.copy(source.checkpoint.extra_files())
        graphs, weights = trace(source, _stage(progress, "trace"))
        progress("prune", 0, 1)
        prune(graphs, settings, source)
        manifest = describe(source, settings)
        for component in ("vision_encoder", "embedding"):
            _write(writer, manifest, component, graphs, weights, progress)
        with writer.scratch() as scratch:
            prompts = embed(drawn, writer.folder, manifest, Path(scratch), progress)
            sinks = recipe.algorithm == "sink"
            opened = embed_text(writer.folder, manifest, openings(source, recipe)) if sinks else {}
            calibration = Calibration(prompts, opened, Path(scratch), progress)
            quantized = quantize(graphs["decoder"], settings, calibration)
            _write(writer, manifest, "decoder", graphs, weights, progress, quantized.rotated())
        progress("compare with PyTorch", 0, 1)
        manifest = _with_results(manifest, graphs, quantized, weights, drawn)
        parity = check_parity(
            folder, writer.folder, manifest, source.plan, settings, quantized.layers, quantized.read_weight
        )
        if parity.verdict == "FAIL":
            raise ParityError(f"the exported graphs differ from PyTorch: {parity.reason}; please report this")
        progress("finish", 0, 1)
        return writer.commit(dataclasses.replace(manifest, parity=parity.to_dict()))


def draw_prompts(recipe: Recipe, data: Path | None) -> CalibrationSet | None:
    """Draws the calibration prompts that a recipe needs; None if it needs none.

    Raises:
        CalibrationError: The data are missing or malformed.
        RecipeError: Data were given to a recipe that does not read them.
    """
    if not recipe.needs_calibration:
        if data is not None:
            raise RecipeError(f"recipe {recipe.name} reads no calibration data; leave --calibration out, or use gptq")
        return None
    if data is None:
        return demo_calibration(recipe.calibration_samples, recipe.seed)
    return read_calibration(data, recipe.calibration_samples, recipe.seed)


def embed(
    drawn: CalibrationSet | None, bundle: Path, manifest: Manifest, scratch: Path, progress: Progress
) -> list[dict[str, npt.NDArray[Any]]]:
    """Embeds calibration prompts, with the image tokens that survive, by the graphs that the bundle holds so far.

    Returns:
        The decoder's inputs for each prompt; the embeddings are mapped from files in `scratch`.

    Raises:
        CalibrationError: A picture cannot be read, or a prompt does not fit the context.
    """
    prompts: list[dict[str, npt.NDArray[Any]]] = []
    if drawn is None:
        return prompts
    for number, prompt in enumerate(embed_prompts(bundle, manifest, drawn.items)):
        progress("embed calibration prompts", number, len(drawn.items))
        file = scratch / f"prompt-{number}.npy"
        np.save(file, prompt["inputs_embeds"])
        prompts.append(prompt | {"inputs_embeds": np.load(file, mmap_mode="r")})
    return prompts


def openings(source: Source, recipe: Recipe) -> npt.NDArray[np.int64]:
    """Returns short sequences of random text tokens `[8,4]`; the token that begins prompts begins half of them."""
    plan, bos = source.plan, source.tokenizer.bos_token_id
    known = np.array([token for token in range(plan.vocab_size) if token not in (bos, plan.image_token_id)])
    ids = np.random.Generator(np.random.PCG64(recipe.seed)).choice(known, _OPENINGS)
    if bos is not None:
        ids[: len(ids) // 2, 0] = bos
    return ids


def open_source(folder: Path, name: str) -> Source:
    """Opens a checkpoint and finds its family; reads no weight.

    Raises:
        CheckpointError: The checkpoint is incomplete, corrupt or not supported.
    """
    checkpoint = Checkpoint.open(folder)
    config, family, plan = read_plan(folder, checkpoint.config)
    try:
        tokenizer, _ = load_processors(folder)
    except BundleError as error:
        raise CheckpointError(f"{error}; download the checkpoint again") from error
    if tokenizer.convert_ids_to_tokens(plan.image_token_id) is None:
        raise CheckpointError(
            f"{folder / 'config.json'} names image token {plan.image_token_id}, which the tokenizer does not have; "
            "download the checkpoint again"
        )
    return Source(name, checkpoint, config, family, plan, tokenizer)


def read_plan(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Family, Plan]:
    """Returns the Hugging Face configuration, the family and the sizes from config.json alone.

    Raises:
        CheckpointError: The model type is not supported, or the configuration is not valid.
    """
    family = family_for(config.get("model_type"))
    try:
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return parsed, family, family.plan(parsed)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {_one_line(error)}") from error


def trace(source: Source, progress: Callable[[int, int], None]) -> tuple[dict[str, ir.Model], CheckpointWeights]:
    """Traces the three components; their initializers are lazy tensors of the checkpoint.

    Raises:
        CheckpointError: A tensor is missing or has the wrong shape.
    """
    skeleton, mode = build_skeleton(source.config)
    weights = CheckpointWeights(source.checkpoint, source.family, skeleton)
    # What the headers tell is checked before the tracing takes its time; what is missing shows after it, because a
    # checkpoint need not hold layers that the graphs do not use.
    weights.check_stored()
    graphs = trace_components(source.family, source.plan, skeleton, mode, weights.tensor, progress)
    weights.check(_parameters(graphs))
    return graphs, weights


def prune(graphs: Mapping[str, ir.Model], settings: Settings, source: Source) -> None:
    """Prunes vision tokens behind the projector, in place, and turns weights as MatMul reads them."""
    recipe = settings.recipe
    for graph in graphs.values():
        FoldWeightTransposes()(graph)
    if settings.tokens_kept == source.plan.vision_tokens:
        KeepAllTokens(at="image_features")(graphs["vision_encoder"])
        return
    PruneVisionTokens(
        at="image_features",
        tokens=settings.tokens_kept,
        semantic=settings.semantic,
        alpha=recipe.alpha,
        group_size=settings.group_size,
        score_input=recipe.score_input,
        seed=recipe.seed,
        select=recipe.select,
    )(graphs["vision_encoder"])


def _parameters(graphs: Mapping[str, ir.Model]) -> dict[str, tuple[int, ...]]:
    return {
        value.metadata_props[PARAMETER]: tuple(value.shape.numpy())
        for graph in graphs.values()
        for value in graph.graph.initializers.values()
        if PARAMETER in value.metadata_props and value.shape is not None
    }


def _stored_dtypes(graph: ir.Model, weights: CheckpointWeights, rotated: Collection[str]) -> dict[str, ir.DataType]:
    # What was rotated has digits that 16 bits do not hold.
    return {
        name: weights.stored_dtype(value.metadata_props[PARAMETER])
        for name, value in graph.graph.initializers.items()
        if PARAMETER in value.metadata_props and value.dtype == ir.DataType.FLOAT and name not in rotated
    }


def describe(source: Source, settings: Settings) -> Manifest:
    """Returns what the manifest says before anything has been written."""
    plan, tokenizer = source.plan, source.tokenizer
    eos = _token_ids(source, "eos_token_id", tokenizer.eos_token_id)
    pad = _token_ids(source, "pad_token_id", tokenizer.pad_token_id)
    return Manifest(
        source=source.name,
        family=source.family.model_type,
        recipe=settings.resolved(),
        vision_tokens=VisionTokens(
            before=plan.vision_tokens,
            after=settings.tokens_kept,
            image_token=str(tokenizer.convert_ids_to_tokens(plan.image_token_id)),
            image_token_id=plan.image_token_id,
            positions=settings.recipe.positions,
        ),
        decoder=DecoderSpec(
            num_layers=plan.num_layers,
            num_key_value_heads=plan.num_key_value_heads,
            head_dim=plan.head_dim,
            hidden_size=plan.hidden_size,
            vocab_size=plan.vocab_size,
            context_length=plan.context_length,
            eos_token_ids=eos,
            pad_token_id=(pad or eos or [0])[0],
        ),
        components={},
        precision={},
        weight_error={},
        notes=[],
        calibration=None,
        checkpoint_bytes=source.checkpoint.total_bytes,
        checkpoint_quantization=None,
        parity={},
        versions=_versions(),
    )


def _write(
    writer: BundleWriter,
    manifest: Manifest,
    component: str,
    graphs: Mapping[str, ir.Model],
    weights: CheckpointWeights,
    progress: Progress,
    rotated: Collection[str] = (),
) -> None:
    """Writes one graph, weight by weight, and enters it in the manifest."""
    graph = graphs[component]
    StoreHalf(_stored_dtypes(graph, weights, rotated))(graph)
    stage = _stage(progress, f"write {component}")
    manifest.components[component] = writer.write_graph(component, graph, stage)


def _with_results(
    manifest: Manifest,
    graphs: Mapping[str, ir.Model],
    quantized: Quantization,
    weights: CheckpointWeights,
    drawn: CalibrationSet | None,
) -> Manifest:
    """Returns the manifest with what was measured while the graphs were written."""
    return dataclasses.replace(
        manifest,
        precision={
            f"{component}:{layer.node}": layer.precision
            for component, graph in graphs.items()
            for layer in realized_precision(graph)
        },
        weight_error=quantized.errors(),
        notes=quantized.notes,
        calibration=None if drawn is None else drawn.describe() | {"sensitivity": dict(quantized.sensitivity)},
        checkpoint_quantization=None if weights.prequantized is None else weights.prequantized.describe(),
    )


def _token_ids(source: Source, key: str, fallback: int | None) -> list[int]:
    """Returns token ids from generation_config.json, else the text configuration, else the tokenizer."""
    path = source.checkpoint.folder / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    value = generation.get(key) if isinstance(generation, dict) else None
    if value is None:
        value = getattr(source.config.text_config, key, None)
    if value is None:
        value = fallback
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list) else [int(value)]


def _versions() -> dict[str, str]:
    versions = {}
    for library in ("qavp-export", *_LIBRARIES):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _stage(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
