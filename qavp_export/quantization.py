"""Quantizes the decoder as a recipe says: rotations, a scheme for each layer, Q/DQ nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.calibration.gptq import GptqCalibration
from qavp_export.calibration.rounded import RoundedWeights
from qavp_export.calibration.sensitivity import Sensitivity, choose_raised, measure_sensitivity
from qavp_export.calibration.sink import round_for_openings
from qavp_export.calibration.walk import Walk
from qavp_export.errors import GraphError, QavpError, RecipeError
from qavp_export.numerics.gptq import GptqSettings
from qavp_export.parity import DecoderLayer
from qavp_export.passes import (
    SCHEMES,
    LayerRotation,
    PlaceNvfp4,
    PlaceQdq,
    RewriteResult,
    Rotate,
    RoundWeights,
    Scheme,
    WeightQuantizer,
    by_output_channel,
    linear_layers,
    realized_precision,
)
from qavp_export.recipe import Precision, Recipe
from qavp_export.settings import Settings
from qavp_export.tracing import PARAMETER
from qavp_export.weight_file import WeightFile

HEAD = "lm_head"
# Where a recipe with a size budget raises its most sensitive layers to.
_RAISED: Mapping[Precision, Precision] = MappingProxyType({"w4a4": "w8a8", "w4a8": "w8a8", "w4a16": "w8a16"})


@dataclass(frozen=True)
class DecoderLinear:
    """One linear layer of the decoder.

    Attributes:
        node: Name of its MatMul node.
        module: Its name in the Hugging Face model.
        weight: Its float weight `[K,N]`, as an initializer whose tensor is lazy.
    """

    node: str
    module: str
    weight: ir.Value


@dataclass(frozen=True)
class Quantization:
    """What is done to the decoder: its quantizers are in place, its weights are still to be rounded.

    Attributes:
        layers: Its linear layers as the graph has them.
        weights: Rounds the weights that are not calibrated, when the graph is written.
        calibrate: Rounds those that are, straight into the file of the decoder's graph.
        sensitivity: Measured loss of each layer at 4 bit by module name; empty if it was not measured.
        linears: The layers as they were in float.
        notes: What the recipe asked for and the decoder did not allow, a line each.
    """

    layers: list[DecoderLayer]
    weights: RoundWeights
    calibrate: Callable[[WeightFile], None]
    sensitivity: Mapping[str, float]
    linears: list[DecoderLinear]
    notes: list[str]

    def read_weight(self, parameter: str, _: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Reads a decoder weight `[N,K]` as it was before quantization, rotations folded in."""
        return by_output_channel(next(x.weight for x in self.linears if f"{x.module}.weight" == parameter))

    def errors(self) -> dict[str, float]:
        """Returns the relative error of each rounded weight by module name, once the graph has been written."""
        names = {layer.module: layer.weight.removesuffix(".codes") for layer in self.layers}
        return {module: self.weights.errors[name] for module, name in names.items() if name in self.weights.errors}

    def rotated(self) -> set[str]:
        """Returns the names of the initializers that hold rotated weights."""
        return {layer.weight for layer in self.layers if layer.rotation.inputs or layer.rotation.output is not None}


Inputs = Mapping[str, npt.NDArray[Any]]
"""The decoder's inputs by name."""


@dataclass(frozen=True)
class Calibration:
    """What the decoder is calibrated on.

    Attributes:
        prompts: The decoder's inputs for each calibration prompt; empty for recipes that need none.
        openings: The decoder's inputs for a few short text sequences.
        folder: A folder for what is kept on disk meanwhile: empty, or what an interrupted run has left.
        finished: What is finished; kept for the next run if this one is interrupted.
        progress: Called with the stage, layers done and layers in all.
    """

    prompts: Sequence[Inputs]
    openings: Inputs
    folder: Path
    finished: MutableMapping[str, Any]
    progress: Callable[[str, int, int], None]

    def walk(self, name: str, model: ir.Model, feeds: Sequence[Inputs]) -> Walk:
        """Starts a walk through a model, or goes on with one."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return Walk(model, feeds, folder)

    def stage(self, name: str) -> Callable[[int, int], None]:
        """Returns the progress of one stage."""
        return lambda done, total: self.progress(name, done, total)


def quantize(
    decoder: ir.Model, settings: Settings, calibration: Calibration, errors: MutableMapping[str, float] | None = None
) -> Quantization:
    """Rotates the decoder and places its quantizers, in place. Weights stay lazy: none is rounded yet.

    Args:
        decoder: The decoder's graph in float.
        settings: The recipe, with every choice made.
        calibration: What it is calibrated on.
        errors: Takes the relative error of each weight as it is rounded; None: a new dictionary.

    Raises:
        RecipeError: The recipe does not fit the decoder.
        CalibrationError: The model overflows on the prompts.
    """
    recipe = settings.recipe
    linears = decoder_linears(decoder)
    rotations, notes = rotate_decoder(decoder, settings)
    precisions = choose_precisions(linears, recipe)
    sensitivity: list[Sensitivity] = []
    if recipe.size_budget is not None:
        sensitivity = _raise_sensitive(decoder, linears, settings, precisions, calibration)
    calibrated = _four_bit(precisions, recipe) if recipe.algorithm != "rtn" and recipe.format == "int" else {}
    original = decoder.clone() if calibrated else decoder
    weights = RoundWeights(clip_search=recipe.clip_search, errors=errors)
    place_quantizers(decoder, settings, precisions, weights)

    def calibrate(file: WeightFile) -> None:
        if calibrated:
            rounded = RoundedWeights(file, weights.errors)
            round_layers = _round_by_gptq if recipe.algorithm == "gptq" else _round_for_openings
            round_layers(decoder, original, calibrated, settings, rounded, calibration)

    names = {linear.node: linear.module for linear in linears}
    losses = {names[layer.node]: layer.error for layer in sensitivity}
    return Quantization(_layers(decoder, linears, rotations), weights, calibrate, losses, linears, notes)


def _raise_sensitive(
    decoder: ir.Model,
    linears: list[DecoderLinear],
    settings: Settings,
    precisions: dict[str, Precision],
    calibration: Calibration,
) -> list[Sensitivity]:
    """Measures the 4-bit layers and raises those that lose most, in `precisions`."""
    recipe, finished = settings.recipe, calibration.finished
    if "sensitivity" not in finished:
        # What the user pinned stays as it is.
        pinned = {x.node for x in linears if any(matches(x.module, pattern) for pattern in recipe.keep_precision)}
        schemes = {node: scheme for node, scheme in _four_bit(precisions, recipe).items() if node not in pinned}
        measured = measure_sensitivity(
            calibration.walk("sensitivity", decoder, calibration.prompts),
            decoder,
            schemes,
            settings.group_size,
            RoundWeights(clip_search=recipe.clip_search),
            calibration.stage("measure sensitivity"),
        )
        finished["sensitivity"] = [dataclasses.asdict(layer) for layer in measured]
    sensitivity = [Sensitivity(**layer) for layer in finished["sensitivity"]]
    for layer in choose_raised(sensitivity, recipe.size_budget or 0):
        precisions[layer.node] = _RAISED[precisions[layer.node]]
    return sensitivity


def _round_for_openings(
    _: ir.Model,
    original: ir.Model,
    schemes: Mapping[str, Scheme],
    settings: Settings,
    weights: RoundedWeights,
    calibration: Calibration,
) -> None:
    walk = calibration.walk("openings", original, [calibration.openings])
    progress = calibration.stage("round for the attention sink")
    round_for_openings(walk, original, schemes, settings.group_size, weights, progress)


def _round_by_gptq(
    decoder: ir.Model,
    original: ir.Model,
    schemes: Mapping[str, Scheme],
    settings: Settings,
    weights: RoundedWeights,
    calibration: Calibration,
) -> None:
    GptqCalibration(
        decoder,
        calibration.walk("quantized", decoder, calibration.prompts),
        original,
        calibration.walk("original", original, calibration.prompts),
        weights,
        settings.group_size,
        GptqSettings(damping=settings.recipe.damping, activation_order=settings.recipe.activation_order),
        calibration.folder,
    ).run(schemes, calibration.stage("GPTQ"))


def _four_bit(precisions: Mapping[str, Precision], recipe: Recipe) -> dict[str, Scheme]:
    schemes = {node: _scheme(precision, recipe) for node, precision in precisions.items()}
    return {node: scheme for node, scheme in schemes.items() if scheme is not None and scheme.weights == "int4"}


def decoder_linears(decoder: ir.Model) -> list[DecoderLinear]:
    """Returns the float linear layers of the decoder in graph order."""
    return [
        DecoderLinear(str(node.name), weight.metadata_props[PARAMETER].removesuffix(".weight"), weight)
        for node, weight in linear_layers(decoder)
        if PARAMETER in weight.metadata_props
    ]


def rotate_decoder(decoder: ir.Model, settings: Settings) -> tuple[Mapping[str, LayerRotation], list[str]]:
    """Rotates the decoder if the recipe says so; inputs at run time where the residual stream cannot be rotated.

    Returns:
        What was folded into each linear layer, by node name, and what could not be rotated, with the reason.
    """
    recipe = settings.recipe
    if recipe.rotation == "none":
        return {}, []
    notes: list[str] = []
    try:
        result = Rotate(settings.group_size, seed=recipe.seed)(decoder)
    except GraphError as error:
        # Nothing has been changed. Gemma has a norm behind each layer.
        notes.append(f"the residual stream is not rotated, its readers' inputs are instead, at run time: {error}")
        result = Rotate(settings.group_size, seed=recipe.seed, stream=False)(decoder)
    return result.layers, notes + [f"values of {x.node_name} are not rotated: {x.reason}" for x in result.refused]


def choose_precisions(linears: list[DecoderLinear], recipe: Recipe) -> dict[str, Precision]:
    """Returns the precision of each linear layer, by node name.

    Raises:
        RecipeError: A pattern of `keep_precision` matches no layer.
    """
    chosen = {linear.node: precision_of(linear.module, recipe) for linear in linears}
    unused = [
        pattern for pattern in recipe.keep_precision if not any(matches(linear.module, pattern) for linear in linears)
    ]
    if unused:
        raise RecipeError(
            f"keep_precision {unused[0]!r} matches no linear layer of the decoder; its layers have names like "
            f"{linears[0].module} and {linears[-1].module}"
        )
    return chosen


def _layers(
    decoder: ir.Model, linears: list[DecoderLinear], rotations: Mapping[str, LayerRotation]
) -> list[DecoderLayer]:
    modules = {linear.node: linear.module for linear in linears}
    layers = []
    for realized in realized_precision(decoder):
        if realized.node in modules:
            rotation = rotations.get(realized.node, LayerRotation())
            gain = rotation.gain.metadata_props[PARAMETER] if rotation.gain is not None else None
            module = modules[realized.node]
            layers.append(
                DecoderLayer(module, realized.precision, realized.activation, realized.weight, rotation, gain)
            )
    return layers


def precision_of(module: str, recipe: Recipe) -> Precision:
    """Returns the precision that a recipe asks for a linear layer of the decoder, by its Hugging Face name."""
    for pattern, precision in recipe.keep_precision.items():
        if matches(module, pattern):
            return precision
    return recipe.lm_head if module.split(".")[-1] == HEAD else recipe.decoder


def matches(module: str, pattern: str) -> bool:
    """Whether a glob is a module's name or an end of it: `layers.0.mlp.*` matches `model.layers.0.mlp.up_proj`."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def place_quantizers(
    decoder: ir.Model, settings: Settings, precisions: Mapping[str, Precision], quantizer: WeightQuantizer
) -> None:
    """Places the nodes that quantize weights and activations.

    Raises:
        QavpError: A layer cannot be quantized as its precision says; the message says why.
    """
    recipe = settings.recipe
    fp4 = [node for node, precision in precisions.items() if recipe.format == "nvfp4" and precision == "w4a4"]
    if fp4:
        # Before the integers: a layer that is FP4 already is no plain MatMul any more.
        _check(PlaceNvfp4(fp4)(decoder))
    schemes = [(node, _scheme(precision, recipe)) for node, precision in precisions.items() if node not in fp4]
    _check(PlaceQdq(settings.group_size, schemes, quantizer)(decoder))


def _scheme(precision: Precision, recipe: Recipe) -> Scheme | None:
    if precision == "float":
        return None
    scheme = SCHEMES[precision]
    return Scheme(scheme.weights, scheme.activations, recipe.scales)


def _check(result: RewriteResult) -> None:
    if result.refused:
        refusal = result.refused[0]
        raise QavpError(f"{refusal.node_name} cannot be quantized: {refusal.reason}; use --recipe none")
