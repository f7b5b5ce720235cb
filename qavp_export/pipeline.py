"""The main job: a checkpoint becomes a bundle. Read top to bottom; every step is one call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from qavp_export.bundle import BundleWriter, describe_component
from qavp_export.calibration import CalibrationSet, demo_calibration, read_calibration
from qavp_export.calibration.prompts import embed_prompts, embed_text
from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import BundleError, CheckpointError, ParityError, RecipeError
from qavp_export.families import Family, Layout, Plan, family_of
from qavp_export.manifest import DecoderSpec, Manifest, VisionTokens
from qavp_export.parity import Exported, check_parity
from qavp_export.parity.tapped import TOKEN_TYPES
from qavp_export.passes import (
    FoldWeightTransposes,
    KeepAllTokens,
    PruneVisionTokens,
    StoreHalf,
    realized_precision,
)
from qavp_export.quantization import Calibration, Quantization, quantize
from qavp_export.recipe import Recipe
from qavp_export.runtime.processors import load_processor
from qavp_export.settings import Settings, settle
from qavp_export.tracing import PARAMETER, build_skeleton, trace_components
from qavp_export.weights import CheckpointWeights

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# Sequences that stand for whatever begins a prompt, and their length.
_OPENINGS = (8, 4)
# What the keep ratio applies to. Where images are not cut up, their only tile is the image.
_UNITS: Mapping[Layout, str] = MappingProxyType({"grid": "tile", "tiles": "tile-set", "native": "image"})
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
    resume: bool = False,
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
        resume: Go on where an interrupted export of the same kind has stopped, and leave what is finished for the next
            one if this is interrupted. The bundle is the same, byte by byte, as that of an uninterrupted export.

    Returns:
        The bundle's manifest.

    Raises:
        QavpError: Bad input, an unavailable target, a failed parity check; see the subclasses.
    """
    source = open_source(folder, name)
    settings = settle(recipe, source.family, source.plan)
    drawn = draw_prompts(recipe, calibration_data)
    identity = identify(source, settings, drawn)
    with BundleWriter(target, force=force, resume=resume, identity=identity) as writer:
        writer.copy(source.checkpoint.extra_files())
        graphs, weights = trace(source, _stage(progress, "trace"))
        progress("prune", 0, 1)
        prune(graphs, settings)
        manifest = describe(source, settings)
        for component in ("vision_encoder", "embedding"):
            _store_half(graphs[component], weights)
            stage = _stage(progress, f"write {component}")
            manifest.components[component] = writer.write_graph(component, graphs[component], stage)
        quantized = quantize_decoder(graphs["decoder"], source, settings, drawn, manifest, writer, progress)
        _store_half(graphs["decoder"], weights, quantized.rotated())
        file = writer.open_graph("decoder", graphs["decoder"])
        quantized.calibrate(file)
        file.finish(_stage(progress, "write decoder"))
        manifest.components["decoder"] = describe_component("decoder", graphs["decoder"])
        manifest = _with_results(manifest, graphs, quantized, weights, drawn)
        exported = Exported(
            source.checkpoint, source.family, source.plan, settings, writer.folder, manifest, quantized.layers
        )
        progress("compare with PyTorch", 0, 1)
        compare = _stage(progress, "compare with PyTorch")
        parity = check_parity(exported, quantized.read_weight, writer.work, compare)
        if parity.verdict == "FAIL":
            raise ParityError(f"the exported graphs differ from PyTorch: {parity.reason}; please report this")
        progress("finish", 0, 1)
        return writer.commit(dataclasses.replace(manifest, parity=parity.to_dict()))


def identify(source: Source, settings: Settings, drawn: CalibrationSet | None) -> dict[str, Any]:
    """Returns what an export can only be resumed with: checkpoint, recipe, calibration data and versions."""
    return {
        "checkpoint": source.checkpoint.fingerprint(),
        "recipe": settings.resolved(),
        "calibration": None if drawn is None else drawn.describe(),
        "version": _versions(),
    }


def quantize_decoder(
    decoder: ir.Model,
    source: Source,
    settings: Settings,
    drawn: CalibrationSet | None,
    manifest: Manifest,
    writer: BundleWriter,
    progress: Progress,
) -> Quantization:
    """Places the decoder's quantizers, in place; calibration runs the graphs that the bundle holds so far."""
    typed = any(value.name == TOKEN_TYPES for value in decoder.graph.inputs)
    prompts = embed(drawn, writer, manifest, progress, token_types=typed)
    opened = {}
    if settings.recipe.algorithm == "sink":
        opened = embed_text(writer.folder, manifest, openings(source, settings.recipe), token_types=typed)
    calibration = Calibration(prompts, opened, writer.work, writer.journal.section("calibration"), progress)
    return quantize(decoder, settings, calibration, writer.journal.section("weight_error"))


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
    drawn: CalibrationSet | None, writer: BundleWriter, manifest: Manifest, progress: Progress, *, token_types: bool
) -> list[dict[str, npt.NDArray[Any]]]:
    """Embeds calibration prompts, with the image tokens that survive, by the graphs that the bundle holds so far.

    Returns:
        The decoder's inputs for each prompt; they are mapped from files.

    Raises:
        CalibrationError: A picture cannot be read, or a prompt does not fit the context.
    """
    prompts: list[dict[str, npt.NDArray[Any]]] = []
    if drawn is None:
        return prompts
    finished = writer.journal.section("prompts")
    # They are embedded in order.
    embedded = len(finished)
    rest: Iterable[dict[str, npt.NDArray[Any]]] = ()
    if embedded < len(drawn.items):
        rest = embed_prompts(writer.folder, manifest, drawn.items[embedded:], token_types=token_types)
    for number, prompt in enumerate(rest, embedded):
        progress("embed calibration prompts", number, len(drawn.items))
        for name, array in prompt.items():
            np.save(writer.work / f"prompt-{number}.{name}.npy", array)
        finished[str(number)] = list(prompt)
    for number in range(len(drawn.items)):
        files = {name: writer.work / f"prompt-{number}.{name}.npy" for name in finished[str(number)]}
        prompts.append({name: np.load(file, mmap_mode="r") for name, file in files.items()})
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
        tokenizer = load_processor(folder).tokenizer
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
    family = family_of(config)
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


def prune(graphs: Mapping[str, ir.Model], settings: Settings) -> None:
    """Prunes vision tokens behind the projector, in place, and turns weights as MatMul reads them."""
    recipe = settings.recipe
    for graph in graphs.values():
        FoldWeightTransposes()(graph)
    if not settings.pruned:
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
        keep_input=settings.tokens_kept is None,
    )(graphs["vision_encoder"])


def _parameters(graphs: Mapping[str, ir.Model]) -> dict[str, tuple[int, ...]]:
    return {
        value.metadata_props[PARAMETER]: tuple(value.shape.numpy())
        for graph in graphs.values()
        for value in graph.graph.initializers.values()
        if PARAMETER in value.metadata_props and value.shape is not None
    }


def _store_half(graph: ir.Model, weights: CheckpointWeights, rotated: Collection[str] = ()) -> None:
    """Stores what came in 16 bits in 16 bits, but for what was rotated: that has digits which 16 bits do not hold."""
    StoreHalf(
        {
            name: weights.stored_dtype(value.metadata_props[PARAMETER])
            for name, value in graph.graph.initializers.items()
            if PARAMETER in value.metadata_props and value.dtype == ir.DataType.FLOAT and name not in rotated
        }
    )(graph)


def describe(source: Source, settings: Settings) -> Manifest:
    """Returns what the manifest says before anything has been written."""
    plan, tokenizer = source.plan, source.tokenizer
    eos = _token_ids(source, "eos_token_id", tokenizer.eos_token_id)
    pad = _token_ids(source, "pad_token_id", tokenizer.pad_token_id)
    return Manifest(
        source=source.name,
        family=source.family.model_type,
        recipe=settings.resolved(),
        vision_tokens=_vision_tokens(source, settings),
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


def _vision_tokens(source: Source, settings: Settings) -> VisionTokens:
    recipe, layout = settings.recipe, source.family.layout
    newlines = "dropped" if settings.pruned else "kept"
    return VisionTokens(
        before=source.plan.vision_tokens,
        after=settings.tokens_kept,
        image_token=str(source.tokenizer.convert_ids_to_tokens(source.plan.image_token_id)),
        image_token_id=source.plan.image_token_id,
        positions=recipe.positions,
        keep=recipe.keep,
        keep_range=None if recipe.keep_range is None else list(recipe.keep_range),
        layout=layout,
        layout_settings=_layout_settings(source),
        unit=_UNITS[layout],
        newlines=newlines if layout == "tiles" else None,
    )


def _layout_settings(source: Source) -> dict[str, Any]:
    settings, row_break = source.family.layout_settings(source.config), source.family.row_break_token
    if row_break is None:
        return settings
    token = source.tokenizer.convert_tokens_to_ids(row_break)
    # For what it does not have, a tokenizer gives the id of unknown words.
    known = token is not None and source.tokenizer.convert_ids_to_tokens(token) == row_break
    return settings | {"row_break_token_id": token} if known else settings


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
