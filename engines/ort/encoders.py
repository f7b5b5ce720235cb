"""What comes before a bundle's decoder, run by ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.engines.ort.session import Values, input_names, open_graph, value
from qavp_export.engines.sequences import check_placeholders
from qavp_export.manifest import Manifest

VISION_OUTPUTS = ("image_features", "kept_indices")


class VisionEncoder(Protocol):
    """A vision encoder, in one graph or more."""

    inputs: frozenset[str]

    def run(self, inputs: Values) -> Values:
        """Encodes images; what it returns contains `VISION_OUTPUTS`."""


class OrtEmbedding:
    """Runs a bundle's embedding. Its table is mapped from the file, not read."""

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens the graph.

        Raises:
            BundleError: The graph is missing, cannot be opened, or lacks an input or output of the contract.
            InputError: An option is out of range.
        """
        inputs = ["input_ids", "image_features"]
        # It looks up and copies: threads would only wait for one another.
        one = dataclasses.replace(options, threads=1)
        self._embedding = open_graph(bundle, manifest, "embedding", one, inputs, ["inputs_embeds"])
        self._image_token_id = manifest.vision_tokens.image_token_id
        no_images = (0, manifest.vision_tokens.after or 1, manifest.decoder.hidden_size)
        self._no_images = value(np.zeros(no_images, np.float32), np.float32)

    def embed(self, input_ids: IntArray, image_features: FloatArray) -> FloatArray:
        """See `Encoders.embed`."""
        check_placeholders(input_ids, image_features, self._image_token_id)
        inputs = {
            "input_ids": value(input_ids, np.int64),
            "image_features": value(image_features, np.float32),
        }
        embeds: FloatArray = self._embedding.run(inputs)["inputs_embeds"].numpy()
        return embeds

    def embed_text(self, input_ids: IntArray) -> ort.OrtValue:
        """Embeds `[B, S]` ids, none of them a placeholder, as ONNX Runtime hands it on."""
        inputs = {"input_ids": value(input_ids, np.int64), "image_features": self._no_images}
        return self._embedding.run(inputs)["inputs_embeds"]


class OrtEncoders(OrtEmbedding):
    """Runs what comes before a bundle's decoder: vision encoder and embedding."""

    def __init__(
        self, bundle: Path, manifest: Manifest, options: EngineOptions, vision: VisionEncoder | None = None
    ) -> None:
        """Opens the graphs; see `OrtEmbedding`.

        Args:
            bundle: The bundle's folder.
            manifest: Its manifest.
            options: How graphs are opened.
            vision: The vision encoder to run; None opens the canonical one.
        """
        super().__init__(bundle, manifest, options)
        # What comes beside the pixels depends on the model.
        inputs = sorted({"pixel_values", *input_names(manifest, "vision_encoder")})
        self._vision = vision or open_graph(bundle, manifest, "vision_encoder", options, inputs, VISION_OUTPUTS)

    def encode_images(self, inputs: Mapping[str, FloatArray | IntArray]) -> tuple[FloatArray, IntArray]:
        """See `Encoders.encode_images`."""
        outputs = self._vision.run(
            {
                name: value(array, np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32)
                for name, array in inputs.items()
            }
        )
        return outputs["image_features"].numpy(), outputs["kept_indices"].numpy()
