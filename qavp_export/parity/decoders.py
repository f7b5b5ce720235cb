"""Runs the exported decoder beside the reference: complete, or layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from qavp_export.calibration.walk import Walk
from qavp_export.checkpoint import Checkpoint
from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.engines.ort.encoders import OrtEncoders
from qavp_export.families import Family, Plan
from qavp_export.manifest import Manifest
from qavp_export.parity.layers import Agreement, DecoderLayer
from qavp_export.parity.loading import load_streamed
from qavp_export.parity.prompts import Prompts, random_prompts
from qavp_export.parity.reference import DecoderReference
from qavp_export.parity.tapped import prefill_feeds, run_decoder
from qavp_export.parity.weights import WeightComparison
from qavp_export.settings import Settings
from qavp_export.text_tower import TextTower

# The arithmetic as it is written.
PLAIN = EngineOptions(graph_optimization="disable")
# Image tokens of a prompt that goes through all layers one by one.
_STREAMED_TOKENS = 8


@dataclass(frozen=True)
class Exported:
    """What is compared.

    Attributes:
        checkpoint: The checkpoint.
        family: Its family.
        plan: Its sizes.
        settings: The recipe, with every choice made.
        bundle: The folder that holds the graphs.
        manifest: The bundle's manifest, `parity` not yet filled in.
        layers: The decoder's linear layers.
        text_tower: The CLIP checkpoint that the question is read with; None if none is read.
    """

    checkpoint: Checkpoint
    family: Family
    plan: Plan
    settings: Settings
    bundle: Path
    manifest: Manifest
    layers: list[DecoderLayer]
    text_tower: TextTower | None = None

    @property
    def decoder(self) -> Path:
        """The decoder's graph."""
        return self.bundle / self.manifest.components["decoder"].file

    @property
    def modules(self) -> list[str]:
        """The names of the decoder's linear layers."""
        return [layer.module for layer in self.layers]


@dataclass(frozen=True)
class Comparison:
    """A comparison of decoders.

    Attributes:
        actual: The graph's logits of tokens that count `[tokens,V]`.
        expected: The reference's.
        weights: The comparison of the weights.
        activations: That of the quantized activations.
    """

    actual: FloatArray
    expected: FloatArray
    weights: WeightComparison
    activations: Agreement


def _prompts(exported: Exported, features: FloatArray) -> Prompts:
    rng = np.random.default_rng(exported.settings.recipe.seed)
    return random_prompts(rng, exported.plan, features.shape[1])


def compare_complete(
    exported: Exported, graph: Path, model: Any, features: FloatArray, expected_features: FloatArray
) -> Comparison:
    """Runs a whole graph and a loaded model on the same prompts.

    Args:
        exported: The export.
        graph: The decoder's graph, or one with fewer layers.
        model: The Hugging Face model with as many.
        features: Image features of the graph's surviving tokens `[B,k,D]`.
        expected_features: The reference's.
    """
    prompts = _prompts(exported, features)
    encoders = OrtEncoders(exported.bundle, exported.manifest, PLAIN)
    embeds = encoders.embed(prompts.ids, features)
    next_embeds = encoders.embed(prompts.next_ids, features[:0])
    taps = sorted({layer.activation for layer in exported.layers if layer.activation is not None})
    run = run_decoder(graph, embeds, next_embeds, prompts, taps)
    valid = (prompts.mask, np.ones_like(prompts.next_ids))

    def observe(activation: str) -> Iterator[tuple[FloatArray, IntArray]]:
        return iter(list(zip(run.activations[activation], valid, strict=True)))

    def read(_: DecoderLayer, linear: nn.Linear) -> torch.Tensor:
        return linear.weight

    weights = WeightComparison(model, exported.layers, exported.settings, graph, read, whole=True)
    reference = DecoderReference(model, exported.family, exported.plan, exported.settings, exported.layers, weights)
    expected = reference.decode(prompts, expected_features, observe)
    rows = prompts.grown_mask.astype(bool)
    return Comparison(run.logits[rows], expected[rows], weights, reference.activations)


def compare_layers(
    exported: Exported, features: FloatArray, work: Path, progress: Callable[[int, int], None]
) -> Comparison:
    """Runs graph and model side by side, a layer at a time, each with that layer's weights only.

    Args:
        exported: The export.
        features: Image features of surviving tokens `[B,k,D]`.
        work: A folder for values in between.
        progress: Called with layers done and layers in all.
    """
    model, checkpoint = load_streamed(exported.checkpoint, exported.family, exported.modules)
    features = features[:, :_STREAMED_TOKENS]
    prompts = _prompts(exported, features)
    embeds = OrtEncoders(exported.bundle, exported.manifest, PLAIN).embed(prompts.ids, features)
    decoder = ir.load(exported.decoder)
    feeds = prefill_feeds({str(x.name): list(x.shape or ()) for x in decoder.graph.inputs}, embeds, prompts)
    values = {str(value.name): value for node in decoder.graph for value in node.outputs}
    done = iter(range(len(exported.layers)))

    def observe(activation: str) -> Iterator[tuple[FloatArray, IntArray]]:
        progress(next(done), len(exported.layers))
        walk.advance([values[activation]])
        yield next(walk.read(values[activation])), prompts.mask

    def read(layer: DecoderLayer, linear: nn.Linear) -> torch.Tensor:
        weight = checkpoint.tensor(f"{layer.module}.weight", tuple(linear.weight.shape))
        return torch.from_numpy(np.ascontiguousarray(weight.numpy()))

    with tempfile.TemporaryDirectory(dir=work) as folder:
        walk = Walk(decoder, [feeds], Path(folder))
        weights = WeightComparison(model, exported.layers, exported.settings, exported.decoder, read, whole=False)
        reference = DecoderReference(model, exported.family, exported.plan, exported.settings, exported.layers, weights)
        expected = reference.prefill(prompts, embeds, observe)
        logits = decoder.graph.outputs[0]
        walk.advance([logits])
        actual = next(walk.read(logits))
    rows = prompts.mask.astype(bool)
    return Comparison(actual[rows], expected[rows], weights, reference.activations)
