"""The engines `tensorrt` and `tensorrt-rtx`: serialized engines of a bundle, run on an NVIDIA GPU without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qavp_export.engines import EngineOptions, FloatArray, IntArray
from qavp_export.engines.cuda.driver import Device
from qavp_export.engines.sequences import check_placeholders
from qavp_export.engines.tensorrt.decoder import TensorRtDecoder
from qavp_export.engines.tensorrt.execution import Network, Stage
from qavp_export.engines.tensorrt.keys import (
    KEYS_NAME,
    TENSORRT,
    TENSORRT_RTX,
    EngineKeys,
    Machine,
    check_keys,
    engine_folder,
)
from qavp_export.engines.tensorrt.library import Library
from qavp_export.engines.tensorrt.session import TensorRtSession
from qavp_export.errors import BundleError, InputError, UnavailableError
from qavp_export.manifest import Manifest

_PIXELS = "pixel_values"
_QUESTIONS = "text_input_ids"


class TensorRtEngine:
    """Runs a bundle's engines. Serves calls from several threads at once."""

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions, flavour: str = TENSORRT) -> None:
        """Compares what was built with this machine, then opens it.

        Args:
            bundle: The bundle's folder.
            manifest: Its manifest.
            options: How it is opened; what is for processors is left at its default.
            flavour: `tensorrt` or `tensorrt-rtx`.

        Raises:
            UnavailableError: The bundle has no such engines, or they do not fit what is found here.
            BundleError: They are missing or damaged.
            InputError: An option is for another engine.
        """
        _check_options(flavour, options)
        keys = EngineKeys.read(bundle, flavour)
        library = Library(flavour)
        try:
            device = Device.open()
        except UnavailableError as error:
            raise UnavailableError(f"engine {flavour!r} is not available here: {error}") from error
        major, minor = device.capability
        check_keys(keys, Machine(library.version, 10 * major + minor, device.driver_version), bundle)
        folder = bundle / engine_folder(flavour)

        def open_network(name: str) -> Network:
            if name not in keys.graphs:
                raise BundleError(f"{folder / KEYS_NAME} has no graph {name!r}; export the bundle again")
            graph = keys.graphs[name]
            return Network(library, device, name.replace("_", " "), folder / graph.file, graph)

        self._device = device
        # What needs most memory to open comes first.
        decoder = open_network("decoder")
        self._image_token_id = manifest.vision_tokens.image_token_id
        # Elsewhere the pictures of one call are parts of one image.
        self._separable = manifest.vision_tokens.layout == "grid"
        self._vision = Stage(open_network("vision_encoder"))
        self._embedding = Stage(open_network("embedding"))
        captures = flavour == TENSORRT
        self._decoder = TensorRtDecoder(device, decoder, self._embedding, manifest.decoder, captures=captures)

    def encode_images(self, inputs: Mapping[str, FloatArray | IntArray]) -> tuple[FloatArray, IntArray]:
        """See `Encoders.encode_images`.

        Raises:
            InputError: The engine was not built for images of this shape.
        """
        self._device.make_current()
        network = self._vision.network
        pixels = inputs[_PIXELS]
        each = network.limits(_PIXELS, 0)[1][0] if self._separable else len(pixels)
        by_picture = {name: array for name, array in inputs.items() if name in (_PIXELS, _QUESTIONS)}
        parts = [
            {**inputs, **{name: array[start : start + each] for name, array in by_picture.items()}}
            for start in range(0, len(pixels), each)
        ]
        found = [self._vision.run(part) for part in parts]
        features, indices = (
            np.concatenate([outputs[name] for outputs in found]) for name in ("image_features", "kept_indices")
        )
        return features.astype(np.float32, copy=False), indices.astype(np.int64, copy=False)

    def embed(self, input_ids: IntArray, image_features: FloatArray) -> FloatArray:
        """See `Encoders.embed`.

        Raises:
            InputError: The engine was not built for so many tokens.
        """
        check_placeholders(input_ids, image_features, self._image_token_id)
        self._device.make_current()
        least, most = self._embedding.network.limits("image_features", 0)
        # Units of one size may come in one row.
        each = least[1] if least[1] == most[1] else image_features.shape[1]
        features = image_features.reshape(-1, each, image_features.shape[2]) if image_features.size else image_features
        # No placeholder asks for what is added.
        features = np.pad(features, [(0, max(least[0] - len(features), 0)), (0, 0), (0, 0)])
        outputs = self._embedding.run({"input_ids": input_ids, "image_features": features})
        return outputs["inputs_embeds"].astype(np.float32, copy=False)

    def start(self, capacity: int = 0) -> TensorRtSession:
        """See `Engine.start`."""
        self._device.make_current()
        return TensorRtSession(self._decoder, capacity)


class TensorRtRtxEngine(TensorRtEngine):
    """Runs a bundle's engines for TensorRT-RTX."""

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens them; see `TensorRtEngine`."""
        super().__init__(bundle, manifest, options, TENSORRT_RTX)


def _check_options(flavour: str, options: EngineOptions) -> None:
    if options.vision is not None or options.cpu_memory != "high" or options.kv_cache is not None:
        raise InputError(f"engine {flavour} runs what was built; leave vision, cpu_memory and kv_cache out")
