"""The main job: a checkpoint becomes a bundle. Read top to bottom; every step is one call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from qavp_export.bundle import BundleWriter
from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import BundleError, CheckpointError, ParityError, QavpError
from qavp_export.families import Family, Plan, family_for
from qavp_export.manifest import Component, DecoderSpec, Manifest, VisionTokens
from qavp_export.parity import QuantizedLayer, check_parity
from qavp_export.passes import (
    W4A4,
    W8A16,
    FoldWeightTransposes,
    KeepAllTokens,
    PlaceQdq,
    PruneVisionTokens,
    Scheme,
    StoreHalf,
    realized_precision,
)
from qavp_export.recipe import Recipe
from qavp_export.runtime.processors import load_processors
from qavp_export.settings import Settings, settle
from qavp_export.tracing import PARAMETER, build_skeleton, trace_components
from qavp_export.weights import CheckpointWeights

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]

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


def export(folder: Path, recipe: Recipe, target: Path, *, name: str, force: bool, progress: Progress) -> Manifest:
    """Exports a checkpoint folder as a bundle.

    Args:
        folder: The checkpoint folder.
        recipe: What to do.
        target: The bundle's folder; it appears complete or not at all.
        name: The model as the user named it.
        force: Replace an existing bundle.
        progress: Called as the work goes on.

    Returns:
        The bundle's manifest.

    Raises:
        QavpError: Bad input, an unavailable target, a failed parity check; see the subclasses.
    """
    source = open_source(folder, name)
    settings = settle(recipe, source.family, source.plan)
    with BundleWriter(target, force=force) as writer:
        graphs, weights = trace(source, _stage(progress, "trace"))
        progress("rewrite", 0, 1)
        rewrite(graphs, settings, source, weights)
        components = {
            component: writer.write_graph(component, graph, _stage(progress, f"write {component}"))
            for component, graph in graphs.items()
        }
        writer.copy(source.checkpoint.extra_files())
        manifest = _manifest(source, settings, components, graphs)
        progress("compare with PyTorch", 0, 1)
        layers = _quantized_layers(graphs["decoder"])
        parity = check_parity(folder, writer.folder, manifest, source.plan, settings, layers)
        if parity.verdict == "FAIL":
            raise ParityError(f"the exported graphs differ from PyTorch: {parity.reason}; please report this")
        progress("finish", 0, 1)
        return writer.commit(dataclasses.replace(manifest, parity=parity.to_dict()))


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


def rewrite(graphs: Mapping[str, ir.Model], settings: Settings, source: Source, weights: CheckpointWeights) -> None:
    """Runs the passes on the traced graphs, in place."""
    recipe = settings.recipe
    for graph in graphs.values():
        FoldWeightTransposes()(graph)
    if settings.tokens_kept < source.plan.vision_tokens:
        prune = PruneVisionTokens(
            at="image_features",
            tokens=settings.tokens_kept,
            semantic=settings.semantic,
            alpha=recipe.alpha,
            group_size=settings.group_size,
            score_input=recipe.score_input,
            seed=recipe.seed,
            select=recipe.select,
        )
        prune(graphs["vision_encoder"])
    else:
        KeepAllTokens(at="image_features")(graphs["vision_encoder"])
    schemes = _schemes(recipe)
    if schemes:
        refused = PlaceQdq(settings.group_size, schemes)(graphs["decoder"]).refused
        if refused:
            raise QavpError(f"{refused[0].node_name} cannot be quantized: {refused[0].reason}; use --recipe none")
    for graph in graphs.values():
        StoreHalf(_stored_dtypes(graph, weights))(graph)


def _schemes(recipe: Recipe) -> list[tuple[str, Scheme]]:
    schemes = []
    if recipe.lm_head == "w8a16":
        schemes.append(("/lm_head/*", W8A16))
    if recipe.decoder == "w4a4":
        schemes.append(("/model/layers.*", W4A4))
    return schemes


def _parameters(graphs: Mapping[str, ir.Model]) -> dict[str, tuple[int, ...]]:
    return {
        value.metadata_props[PARAMETER]: tuple(value.shape.numpy())
        for graph in graphs.values()
        for value in graph.graph.initializers.values()
        if PARAMETER in value.metadata_props and value.shape is not None
    }


def _stored_dtypes(graph: ir.Model, weights: CheckpointWeights) -> dict[str, ir.DataType]:
    return {
        name: weights.stored_dtype(value.metadata_props[PARAMETER])
        for name, value in graph.graph.initializers.items()
        if PARAMETER in value.metadata_props and value.dtype == ir.DataType.FLOAT
    }


def _quantized_layers(decoder: ir.Model) -> list[QuantizedLayer]:
    """Returns the decoder's linear layers under their Hugging Face names."""
    layers = []
    for layer in realized_precision(decoder):
        parameter = decoder.graph.initializers[layer.weight].metadata_props[PARAMETER]
        layers.append(QuantizedLayer(parameter.removesuffix(".weight"), layer.precision, layer.activation))
    return layers


def _manifest(
    source: Source,
    settings: Settings,
    components: dict[str, Component],
    graphs: Mapping[str, ir.Model],
) -> Manifest:
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
        components=components,
        precision={
            f"{component}:{layer.node}": layer.precision
            for component, graph in graphs.items()
            for layer in realized_precision(graph)
        },
        checkpoint_bytes=source.checkpoint.total_bytes,
        parity={},
        versions=_versions(),
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
