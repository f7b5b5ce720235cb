"""The main job: a checkpoint becomes a bundle. Read top to bottom; every step is one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.bundle import BundleWriter, describe_component
from qavp_export.calibration import CalibrationSet, demo_calibration, read_calibration
from qavp_export.calibration.alpha import FIT_PROMPTS, fit_alpha
from qavp_export.calibration.prompts import embed_prompts, embed_text
from qavp_export.description import describe, versions
from qavp_export.engines import TOKEN_TYPES
from qavp_export.engines.ort.lowering.build import build_engines
from qavp_export.engines.tensorrt.build import build_tensorrt_engines, check_targets
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import ParityError, RecipeError
from qavp_export.manifest import Manifest
from qavp_export.parity import Exported, Parity, check_parity
from qavp_export.passes import (
    NVFP4,
    FoldWeightTransposes,
    KeepAllTokens,
    PruneVisionTokens,
    StoreHalf,
    realized_precision,
    set_score_weights,
)
from qavp_export.quantization import Calibration, Quantization, quantize
from qavp_export.recipe import Recipe, check_clip
from qavp_export.settings import Settings, settle
from qavp_export.source import Source, open_source
from qavp_export.text_tower import TOKENIZER_FOLDER, check_tower, open_text_tower
from qavp_export.tracing import PARAMETER, build_clip_skeleton, build_skeleton, trace_components
from qavp_export.weights import CheckpointWeights, JoinedWeights

Weights: TypeAlias = CheckpointWeights | JoinedWeights

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# Sequences that stand for whatever begins a prompt, and their length.
_OPENINGS = (8, 4)


def export(
    folder: Path,
    recipe: Recipe,
    target: Path,
    *,
    name: str,
    force: bool,
    progress: Progress,
    calibration_data: Path | None = None,
    targets: EngineTargets | None = None,
    resume: bool = False,
    clip: tuple[Path, str] | None = None,
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
        targets: What is built beside the engines of ONNX Runtime; None: nothing.
        resume: Go on where an interrupted export of the same kind has stopped, and leave what is finished for the next
            one if this is interrupted. The bundle is the same, byte by byte, as that of an uninterrupted export.
        clip: Folder and name of the CLIP checkpoint that the scorer `text` needs.

    Returns:
        The bundle's manifest.

    Raises:
        QavpError: Bad input, an unavailable target, a failed parity check; see the subclasses.
    """
    check_clip(recipe, given=clip is not None)
    source = open_source(folder, name)
    settings = settle(recipe, source.family, source.plan)
    if clip is not None and settings.reads_question:
        source = dataclasses.replace(source, text_tower=open_text_tower(*clip, source.config))
    targets = targets or EngineTargets()
    check_targets(targets, asked_precisions(recipe), source.plan.context_length, settings.tokens_kept)
    drawn = draw_prompts(recipe, calibration_data)
    identity = identify(source, settings, drawn)
    with BundleWriter(target, force=force, resume=resume, identity=identity) as writer:
        writer.copy(source.checkpoint.extra_files())
        if source.text_tower is not None:
            writer.copy(source.text_tower.files(), TOKENIZER_FOLDER)
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
        settings, manifest = fit_score(graphs["vision_encoder"], settings, drawn, manifest, writer, progress)
        manifest = _with_results(manifest, graphs, quantized, weights, drawn)
        progress("lower", 0, 1)
        manifest = dataclasses.replace(manifest, engines=build_engines(writer.folder, manifest))
        parity = compare(source, settings, writer, manifest, quantized, progress)
        engines = build_tensorrt_engines(writer.folder, manifest, targets, writer.work, progress)
        manifest = dataclasses.replace(manifest, engines=manifest.engines | engines)
        progress("finish", 0, 1)
        return writer.commit(dataclasses.replace(manifest, parity=parity.to_dict()))


def fit_score(
    vision: ir.Model,
    settings: Settings,
    drawn: CalibrationSet | None,
    manifest: Manifest,
    writer: BundleWriter,
    progress: Progress,
) -> tuple[Settings, Manifest]:
    """Chooses the score's weights, if the recipe says so, and writes the vision encoder with them.

    That takes the finished decoder. So the vision encoder is written first with the paper's weights: what GPTQ
    calibrates on are the tokens that those keep.
    """
    if not settings.recipe.fits_alpha or drawn is None:
        return settings, manifest
    fit = fit_alpha(
        writer.folder,
        manifest,
        drawn.items[:FIT_PROMPTS],
        settings.recipe.select,
        writer.work / "alpha_fit",
        writer.journal.section("alpha_fit"),
        _stage(progress, "fit alpha"),
    )
    chosen = dataclasses.asdict(fit.chosen)
    settings = dataclasses.replace(settings, **chosen)
    set_score_weights(vision, **chosen)
    writer.update_graph("vision_encoder", vision)
    return settings, dataclasses.replace(manifest, recipe=settings.resolved(), alpha_fit=fit.to_dict())


def asked_precisions(recipe: Recipe) -> set[str]:
    """Returns what a recipe lets the decoder's layers run in."""
    decoder = NVFP4 if recipe.format == NVFP4 else recipe.decoder
    return {decoder, recipe.lm_head, *recipe.keep_precision.values()}


def compare(
    source: Source,
    settings: Settings,
    writer: BundleWriter,
    manifest: Manifest,
    quantized: Quantization,
    progress: Progress,
) -> Parity:
    """Compares the bundle's graphs with PyTorch.

    Raises:
        ParityError: They differ.
    """
    exported = Exported(
        source.checkpoint,
        source.family,
        source.plan,
        settings,
        writer.folder,
        manifest,
        quantized.layers,
        source.text_tower,
    )
    stage = _stage(progress, "compare with PyTorch")
    stage(0, 1)
    parity = check_parity(exported, quantized.read_weight, writer.work, stage)
    if parity.verdict == "FAIL":
        raise ParityError(f"the exported graphs differ from PyTorch: {parity.reason}; please report this")
    return parity


def identify(source: Source, settings: Settings, drawn: CalibrationSet | None) -> dict[str, Any]:
    """Returns what an export can only be resumed with: checkpoint, recipe, calibration data and versions."""
    tower = source.text_tower
    return {
        "checkpoint": source.checkpoint.fingerprint(),
        "clip": None if tower is None else tower.checkpoint.fingerprint(),
        # What is still to be chosen is not what a number says.
        "recipe": settings.resolved() | {"alpha": settings.recipe.alpha},
        "calibration": None if drawn is None else drawn.describe(),
        "version": versions(),
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
    calibrating = drawn if settings.recipe.calibrates_decoder else None
    prompts = embed(calibrating, writer, manifest, progress, token_types=typed)
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
            raise RecipeError(
                f"recipe {recipe.name} reads no calibration data; leave --calibration out, or use gptq or --alpha auto"
            )
        return None
    samples = recipe.calibration_samples if recipe.calibrates_decoder else min(recipe.calibration_samples, FIT_PROMPTS)
    if data is None:
        return demo_calibration(samples, recipe.seed)
    return read_calibration(data, samples, recipe.seed)


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


def trace(source: Source, progress: Callable[[int, int], None]) -> tuple[dict[str, ir.Model], Weights]:
    """Traces the three components; their initializers are lazy tensors of the checkpoint.

    Raises:
        CheckpointError: A tensor is missing or has the wrong shape.
    """
    skeleton, mode = build_skeleton(source.config)
    weights = CheckpointWeights(source.checkpoint, source.family, skeleton)
    # What the headers tell is checked before the tracing takes its time; what is missing shows after it, because a
    # checkpoint need not hold layers that the graphs do not use.
    weights.check_stored()
    joined: Weights = weights
    clip = None
    if source.text_tower is not None:
        clip = build_clip_skeleton(source.text_tower.config, mode)
        clip_weights = CheckpointWeights(source.text_tower.checkpoint, source.text_tower, clip)
        check_tower(source.text_tower, weights, clip_weights)
        joined = JoinedWeights(weights, clip_weights)
    graphs = trace_components(source.family, source.plan, skeleton, mode, joined.tensor, progress, clip)
    joined.check(_parameters(graphs))
    return graphs, joined


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
        alpha=settings.alpha,
        group_size=settings.group_size,
        score_input=recipe.score_input,
        seed=recipe.seed,
        select=recipe.select,
        keep_input=settings.tokens_kept is None,
        outlier_weight=settings.outlier_weight,
    )(graphs["vision_encoder"])


def _parameters(graphs: Mapping[str, ir.Model]) -> dict[str, tuple[int, ...]]:
    return {
        value.metadata_props[PARAMETER]: tuple(value.shape.numpy())
        for graph in graphs.values()
        for value in graph.graph.initializers.values()
        if PARAMETER in value.metadata_props and value.shape is not None
    }


def _store_half(graph: ir.Model, weights: Weights, rotated: Collection[str] = ()) -> None:
    """Stores what came in 16 bits in 16 bits, but for what was rotated: that has digits which 16 bits do not hold."""
    StoreHalf(
        {
            name: weights.stored_dtype(value.metadata_props[PARAMETER])
            for name, value in graph.graph.initializers.items()
            if PARAMETER in value.metadata_props and value.dtype == ir.DataType.FLOAT and name not in rotated
        }
    )(graph)


def _with_results(
    manifest: Manifest,
    graphs: Mapping[str, ir.Model],
    quantized: Quantization,
    weights: Weights,
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


def _stage(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)
