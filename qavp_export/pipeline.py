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
from qavp_export.calibration import CalibrationSet
from qavp_export.calibration.alpha import FIT_PROMPTS, fit_alpha
from qavp_export.calibration.prompts import embed_prompts, embed_text
from qavp_export.description import describe
from qavp_export.engines import TOKEN_TYPES
from qavp_export.engines.ort.lowering.build import build_engines
from qavp_export.engines.tensorrt.build import build_tensorrt_engines
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import ParityError
from qavp_export.job import Job, open_job
from qavp_export.manifest import Manifest
from qavp_export.parity import Exported, Parity, check_parity
from qavp_export.passes import (
    FoldWeightTransposes,
    KeepAllTokens,
    PruneVisionTokens,
    StoreHalf,
    realized_precision,
    set_score_weights,
)
from qavp_export.quantization import Calibration, Quantization, quantize
from qavp_export.recipe import Recipe
from qavp_export.settings import Settings
from qavp_export.source import Source
from qavp_export.text_tower import TOKENIZER_FOLDER, check_tower
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
    job = open_job(folder, name, recipe, targets or EngineTargets(), clip, calibration_data)
    with BundleWriter(target, force=force, resume=resume, identity=job.identity()) as writer:
        copy_files(job.source, writer)
        graphs, weights = trace(job.source, _stage(progress, "trace"))
        progress("prune", 0, 1)
        prune(graphs, job.settings)
        manifest = describe(job.source, job.settings)
        for component in ("vision_encoder", "embedding"):
            _store_half(graphs[component], weights)
            stage = _stage(progress, f"write {component}")
            manifest.components[component] = writer.write_graph(component, graphs[component], stage)
        quantized = quantize_decoder(graphs["decoder"], job, manifest, writer, progress)
        _store_half(graphs["decoder"], weights, quantized.rotated())
        write_decoder(graphs["decoder"], quantized, manifest, writer, _stage(progress, "write decoder"))
        job, manifest = fit_score(graphs["vision_encoder"], job, manifest, writer, progress)
        manifest = _with_results(manifest, graphs, quantized, weights, job.drawn)
        progress("lower", 0, 1)
        manifest = dataclasses.replace(manifest, engines=build_engines(writer.folder, manifest))
        parity = compare(job, writer, manifest, quantized, progress)
        engines = build_tensorrt_engines(writer.folder, manifest, job.targets, writer.work, progress)
        manifest = dataclasses.replace(manifest, engines=manifest.engines | engines)
        progress("finish", 0, 1)
        return writer.commit(dataclasses.replace(manifest, parity=parity.to_dict()))


def copy_files(source: Source, writer: BundleWriter) -> None:
    """Copies what a bundle takes from its checkpoint as it is: tokenizer, processor and their like."""
    writer.copy(source.checkpoint.extra_files())
    if source.text_tower is not None:
        writer.copy(source.text_tower.files(), TOKENIZER_FOLDER)


def write_decoder(
    decoder: ir.Model,
    quantized: Quantization,
    manifest: Manifest,
    writer: BundleWriter,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the decoder, its calibrated weights as they are found, and describes it in the manifest."""
    file = writer.open_graph("decoder", decoder)
    quantized.calibrate(file)
    file.finish(progress)
    manifest.components["decoder"] = describe_component("decoder", decoder)


def fit_score(
    vision: ir.Model, job: Job, manifest: Manifest, writer: BundleWriter, progress: Progress
) -> tuple[Job, Manifest]:
    """Chooses the score's weights, if the recipe says so, and writes the vision encoder with them.

    That takes the finished decoder. So the vision encoder is written first with the paper's weights: what GPTQ
    calibrates on are the tokens that those keep.
    """
    settings, drawn = job.settings, job.drawn
    if not settings.recipe.fits_alpha or drawn is None:
        return job, manifest
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
    job = dataclasses.replace(job, settings=settings)
    return job, dataclasses.replace(manifest, recipe=settings.resolved(), alpha_fit=fit.to_dict())


def compare(job: Job, writer: BundleWriter, manifest: Manifest, quantized: Quantization, progress: Progress) -> Parity:
    """Compares the bundle's graphs with PyTorch.

    Raises:
        ParityError: They differ.
    """
    source = job.source
    exported = Exported(
        source.checkpoint,
        source.family,
        source.plan,
        job.settings,
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


def quantize_decoder(
    decoder: ir.Model, job: Job, manifest: Manifest, writer: BundleWriter, progress: Progress
) -> Quantization:
    """Places the decoder's quantizers, in place; calibration runs the graphs that the bundle holds so far."""
    typed = any(value.name == TOKEN_TYPES for value in decoder.graph.inputs)
    recipe = job.settings.recipe
    calibrating = job.drawn if recipe.calibrates_decoder else None
    prompts = embed(calibrating, writer, manifest, progress, token_types=typed)
    opened = {}
    if recipe.algorithm == "sink":
        opened = embed_text(writer.folder, manifest, openings(job.source, recipe), token_types=typed)
    calibration = Calibration(prompts, opened, writer.work, writer.journal.section("calibration"), progress)
    return quantize(decoder, job.settings, calibration, writer.journal.section("weight_error"))


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
