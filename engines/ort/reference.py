"""The reference engine: ONNX Runtime runs the canonical graphs as they are, on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import TOKEN_TYPES, EngineOptions
from qavp_export.engines.ort.encoders import OrtEncoders
from qavp_export.engines.ort.growing import GrowingDecoder, GrowingSession
from qavp_export.engines.ort.session import input_names, open_graph
from qavp_export.engines.sequences import cache_names
from qavp_export.errors import InputError, UnavailableError
from qavp_export.manifest import Manifest

_NVFP4 = "nvfp4"


class OrtReferenceEngine(OrtEncoders):
    """Runs a bundle's three graphs with ONNX Runtime's CPU provider.

    Sessions are shared by all calls; everything that a generation changes is in its own `GrowingSession`.
    """

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens the graphs; see `OrtEncoders`.

        Raises:
            InputError: An option asks for what the canonical graphs do not do.
            UnavailableError: The decoder is in NVFP4.
        """
        check_format(bundle, manifest)
        if options.vision == "w8a8" or options.cpu_memory != "high" or options.kv_cache not in (None, "float32"):
            raise InputError(
                "engine ort-reference runs the canonical graphs as they are; leave vision, cpu_memory and kv_cache out"
            )
        super().__init__(bundle, manifest, options)
        past, present = cache_names(manifest.decoder.num_layers)
        typed = TOKEN_TYPES in input_names(manifest, "decoder")
        inputs = ["inputs_embeds", "attention_mask", "position_ids", *past, *([TOKEN_TYPES] if typed else [])]
        decoder = open_graph(bundle, manifest, "decoder", options, inputs, ["logits", *present])
        self._decoder = GrowingDecoder(self, decoder, decoder, None, manifest.decoder, typed)

    def start(self, capacity: int = 0) -> GrowingSession:  # noqa: ARG002  # the cache grows with every token
        """See `Engine.start`."""
        return GrowingSession(self._decoder)


def check_format(bundle: Path, manifest: Manifest) -> None:
    """Checks that ONNX Runtime runs the bundle's decoder.

    Raises:
        UnavailableError: It is in NVFP4.
    """
    if _NVFP4 in manifest.precision.values():
        raise UnavailableError(
            f"the decoder of {bundle} is in NVFP4, which ONNX Runtime {ort.__version__} does not run; it is for "
            "TensorRT on a GPU of compute capability 10 or newer: export with --format int to run it here"
        )
