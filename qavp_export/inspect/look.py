"""What a bundle keeps of one image, and what it answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.errors import BundleError
from qavp_export.inspect.canvas import Canvas, Optics, make_canvas
from qavp_export.inspect.taps import Selection, TappedVision
from qavp_export.manifest import Manifest
from qavp_export.runtime import QavpModel
from qavp_export.runtime.layouts import Unit, choose_keep, load_layout
from qavp_export.runtime.processors import load_processor
from qavp_export.runtime.prompts import EncodedPrompt, PromptEncoder
from qavp_export.runtime.question import load_question_encoder


@dataclass(frozen=True)
class Question:
    """What is asked about the image.

    Attributes:
        text: The prompt; None for none, where only the selection is wanted.
        chat_template: Whether it is wrapped in the checkpoint's chat template.
        keep: The share of vision tokens that survives; None for the bundle's default.
        max_new_tokens: Most tokens of an answer.
    """

    text: str | None = None
    chat_template: bool = True
    keep: float | None = None
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Look:
    """One image as a bundle sees it.

    Attributes:
        image: The image's file.
        manifest: The bundle's manifest.
        canvas: Where the tokens lie.
        selections: What is selected of each unit, by the canonical graph.
    """

    image: Path
    manifest: Manifest
    canvas: Canvas
    selections: tuple[Selection, ...]

    @property
    def kept(self) -> tuple[IntArray, ...]:
        """Kept tokens of each unit."""
        return tuple(selection.kept for selection in self.selections)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers behind the picture, as JSON values."""
        panels = [(panel.unit, list(panel.owners.shape)) for panel in self.canvas.panels]
        return {
            "image": str(self.image),
            "model": self.manifest.source,
            "recipe": self.manifest.recipe,
            "units": [
                {
                    "tokens": len(unit.score),
                    "kept": len(unit.kept),
                    "grids": [shape for owner, shape in panels if owner == index],
                    "kept_indices": unit.kept.tolist(),
                    "order": unit.order.tolist(),
                    "semantic": unit.semantic.tolist(),
                    "error": unit.error.tolist(),
                    "outlier": unit.outlier.tolist(),
                    "score": unit.score.tolist(),
                }
                for index, unit in enumerate(self.selections)
            ],
        }


@dataclass(frozen=True)
class Answer:
    """What a bundle answers.

    Attributes:
        text: The answer.
        recipe: Name of the bundle's recipe.
        engine: What ran it.
        kept: Vision tokens that the decoder saw, of each unit.
        tokens: Vision tokens before pruning.
    """

    text: str
    recipe: str
    engine: str
    kept: tuple[IntArray, ...]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the answer as JSON values."""
        vision = sum(len(unit) for unit in self.kept)
        return {
            "answer": self.text,
            "recipe": self.recipe,
            "engine": self.engine,
            "vision_tokens": vision,
            "vision_tokens_before_pruning": self.tokens,
            "kept_indices": [unit.tolist() for unit in self.kept],
        }


def look(bundle: Path, image: Path, question: Question, options: EngineOptions) -> Look:
    """Runs a bundle's processor and its canonical vision encoder on an image.

    Args:
        bundle: Folder that qavp-export wrote.
        image: The image's file.
        question: What is asked; a selection may depend on it.
        options: How the graph is opened.

    Raises:
        BundleError: The bundle is not whole.
        ImageError: The image cannot be read.
        InputError: The bundle keeps all tokens, or does not serve the share that is asked for.
        PromptError: The prompt does not fit.
    """
    manifest = Manifest.read(bundle)
    vision = TappedVision(bundle, manifest, options)
    calls, canvas = lay_out(bundle, manifest, image, question)
    selections = tuple(selection for inputs in calls for selection in vision.run(inputs))
    return Look(image, manifest, canvas, selections)


def lay_out(
    bundle: Path, manifest: Manifest, image: Path, question: Question
) -> tuple[list[dict[str, npt.NDArray[Any]]], Canvas]:
    """Runs a bundle's processor on an image.

    Args:
        bundle: Folder with the processor's files and config.json.
        manifest: The bundle's manifest.
        image: The image's file.
        question: What is asked.

    Returns:
        The vision encoder's inputs, call by call, and where the tokens of all calls lie.

    Raises:
        QavpError: As `look`.
    """
    layout, processor = load_layout(manifest), load_processor(bundle)
    words = load_question_encoder(bundle, manifest)
    encoder = PromptEncoder(processor, manifest.vision_tokens, layout.image_options, words)
    encoded = _encode(encoder, image, question)
    units = layout.units(encoded, choose_keep(manifest.vision_tokens, question.keep))
    optics = _optics(bundle, manifest, processor.image_processor)
    return list(layout.calls(units)), make_canvas(units, optics, _tile_grid(units, encoded, manifest))


def ask(bundle: Path, image: Path, question: Question, engine: str, options: EngineOptions) -> Answer:
    """Returns a bundle's greedy answer.

    Args:
        bundle: Folder that qavp-export wrote.
        image: The image's file.
        question: What is asked; its text is not None.
        engine: What runs the bundle.
        options: How it is opened.

    Raises:
        QavpError: As `QavpModel.from_bundle` and `QavpModel.generate`.
    """
    model = QavpModel.from_bundle(bundle, engine, options)
    prepared = model.prepare(image, question.text or "", chat_template=question.chat_template, keep=question.keep)
    stream = model.text_stream()
    steps = model.generate_steps(prepared, None, question.max_new_tokens)
    pieces = [stream.push(token) for (token,) in steps if token is not None]
    text = "".join([*pieces, stream.finish()]).strip()
    name = str(model.manifest.recipe.get("name", ""))
    return Answer(text, name, engine, prepared.kept_indices, sum(prepared.unpruned_tokens))


def _encode(encoder: PromptEncoder, image: Path, question: Question) -> EncodedPrompt:
    if question.text is not None:
        return encoder.encode(question.text, [image], question.chat_template)
    if encoder.chat_template is not None:
        return encoder.encode("", [image], True)
    return encoder.encode(encoder.image_token, [image], False)


def _optics(bundle: Path, manifest: Manifest, image_processor: Any) -> Optics:
    """Reads how pictures were normalized, and how large a patch is."""
    mean: FloatArray = np.zeros(3, np.float32)
    deviation: FloatArray = np.ones(3, np.float32)
    if getattr(image_processor, "do_normalize", False):
        mean = np.asarray(image_processor.image_mean, np.float32)
        deviation = np.asarray(image_processor.image_std, np.float32)
    if not getattr(image_processor, "do_rescale", True):
        mean, deviation = mean / np.float32(255), deviation / np.float32(255)
    settings = manifest.vision_tokens.layout_settings
    try:
        config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{bundle / 'config.json'} cannot be read ({error}); export the bundle again") from error
    patch = (config.get("vision_config") or {}).get("patch_size") or 1
    side = patch[0] if isinstance(patch, list) else patch
    return Optics(mean, deviation, int(side), int(settings.get("tile_patches", 0)))


def _tile_grid(units: list[Unit], encoded: EncodedPrompt, manifest: Manifest) -> tuple[int, int] | None:
    """Returns rows and columns of an image's tiles, where the layout tells."""
    settings = manifest.vision_tokens.layout_settings
    if "grid_pinpoints" not in settings or units[0].pixel_values.shape[0] == 1:
        return None
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(tuple(encoded.images["image_sizes"][0]), settings["grid_pinpoints"])
    return height // settings["tile_size"], width // settings["tile_size"]
