"""ONNX Runtime on the CPU: runs the canonical graphs as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import TOKEN_TYPES, EngineOptions, FloatArray, IntArray
from qavp_export.errors import BundleError, InputError, PromptError, QavpError, UnavailableError
from qavp_export.manifest import Manifest

_LEVELS: Mapping[str, ort.GraphOptimizationLevel] = MappingProxyType(
    {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
)
_FATAL = 4
_NVFP4 = "nvfp4"
_Values = dict[str, ort.OrtValue]


class OrtEmbedding:
    """Runs a bundle's embedding."""

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens the graph.

        Raises:
            BundleError: The graph is missing, cannot be opened, or lacks an input or output of the contract.
            InputError: An option is out of range.
        """
        self._settings = session_options(options)
        inputs = ["input_ids", "image_features"]
        self._embedding = _open(bundle, manifest, "embedding", self._settings, inputs, ["inputs_embeds"])
        self._image_token_id = manifest.vision_tokens.image_token_id

    def embed(self, input_ids: IntArray, image_features: FloatArray) -> FloatArray:
        """See `Encoders.embed`."""
        placeholders = int(np.count_nonzero(input_ids == self._image_token_id))
        features = image_features.shape[0] * image_features.shape[1]
        if placeholders != features:
            raise PromptError(
                f"the prompts have {placeholders} image placeholders and the images {features} features; "
                "give each image as many placeholders as it has tokens"
            )
        inputs = {
            "input_ids": _value(input_ids, np.int64),
            "image_features": _value(image_features, np.float32),
        }
        embeds: FloatArray = self._embedding.run(inputs)["inputs_embeds"].numpy()
        return embeds


class OrtEncoders(OrtEmbedding):
    """Runs what comes before a bundle's decoder: vision encoder and embedding."""

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens the graphs; see `OrtEmbedding`."""
        super().__init__(bundle, manifest, options)
        outputs = ["image_features", "kept_indices"]
        # What comes beside the pixels depends on the model.
        inputs = sorted({"pixel_values", *_input_names(manifest, "vision_encoder")})
        self._vision = _open(bundle, manifest, "vision_encoder", self._settings, inputs, outputs)

    def encode_images(self, inputs: Mapping[str, FloatArray | IntArray]) -> tuple[FloatArray, IntArray]:
        """See `Encoders.encode_images`."""
        outputs = self._vision.run(
            {
                name: _value(array, np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32)
                for name, array in inputs.items()
            }
        )
        return outputs["image_features"].numpy(), outputs["kept_indices"].numpy()


class OrtCpuEngine(OrtEncoders):
    """Runs a bundle's three graphs with ONNX Runtime's CPU provider.

    Sessions are shared by all calls; everything that a generation changes is in its own
    `OrtDecoderSession`.
    """

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens the graphs; see `OrtEncoders`.

        Raises:
            UnavailableError: The decoder is in NVFP4.
        """
        if _NVFP4 in manifest.precision.values():
            raise UnavailableError(
                f"the decoder of {bundle} is in NVFP4, which ONNX Runtime {ort.__version__} does not run; it is for "
                "TensorRT on a GPU of compute capability 10 or newer: export with --format int to run it here"
            )
        super().__init__(bundle, manifest, options)
        past, present = _cache_names(manifest.decoder.num_layers)
        self._typed = TOKEN_TYPES in _input_names(manifest, "decoder")
        inputs = ["inputs_embeds", "attention_mask", "position_ids", *past, *([TOKEN_TYPES] if self._typed else [])]
        self._decoder = _open(bundle, manifest, "decoder", self._settings, inputs, ["logits", *present])
        self._spec = manifest.decoder
        self._tokens_per_unit = manifest.vision_tokens.after or 1

    def start(self) -> OrtDecoderSession:
        """See `Engine.start`."""
        no_images = np.zeros((0, self._tokens_per_unit, self._spec.hidden_size), np.float32)
        cache_shape = (self._spec.num_key_value_heads, self._spec.head_dim)
        return OrtDecoderSession(
            self._embedding,
            self._decoder,
            self._spec.num_layers,
            cache_shape,
            _value(no_images, np.float32),
            typed=self._typed,
        )


class OrtDecoderSession:
    """The decoder with the cache of one generation, held as OrtValues from step to step."""

    def __init__(
        self,
        embedding: _Graph,
        decoder: _Graph,
        num_layers: int,
        cache_shape: tuple[int, int],
        no_images: ort.OrtValue,
        *,
        typed: bool,
    ) -> None:
        """Starts with no cache; `cache_shape` is (key/value heads, channels of each head).

        `typed`: whether the decoder takes `token_type_ids`.
        """
        self._embedding = embedding
        self._decoder = decoder
        self._past_names, self._present_names = _cache_names(num_layers)
        self._cache_shape = cache_shape
        self._no_images = no_images
        self._typed = typed
        self._cache: _Values = {}

    def prefill(
        self,
        inputs_embeds: FloatArray,
        attention_mask: IntArray,
        position_ids: IntArray,
        token_type_ids: IntArray | None = None,
    ) -> FloatArray:
        """See `DecoderSession.prefill`."""
        heads, channels = self._cache_shape
        empty = _value(np.zeros((inputs_embeds.shape[0], heads, 0, channels), np.float32), np.float32)
        self._cache = dict.fromkeys(self._past_names, empty)
        return self._step(_value(inputs_embeds, np.float32), attention_mask, position_ids, token_type_ids)

    def decode(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> FloatArray:
        """See `DecoderSession.decode`."""
        inputs = {"input_ids": _value(input_ids, np.int64), "image_features": self._no_images}
        embeds = self._embedding.run(inputs)["inputs_embeds"]
        return self._step(embeds, attention_mask, position_ids, None)

    def reorder(self, rows: IntArray) -> None:
        """See `DecoderSession.reorder`."""
        self._cache = {name: _value(value.numpy()[rows], np.float32) for name, value in self._cache.items()}

    def _step(
        self, embeds: ort.OrtValue, attention_mask: IntArray, position_ids: IntArray, token_type_ids: IntArray | None
    ) -> FloatArray:
        types: _Values = {}
        if self._typed:
            of_text = np.zeros_like(position_ids)
            types = {TOKEN_TYPES: _value(of_text if token_type_ids is None else token_type_ids, np.int64)}
        outputs = self._decoder.run(
            {
                "inputs_embeds": embeds,
                "attention_mask": _value(attention_mask, np.int64),
                "position_ids": _value(position_ids, np.int64),
                **types,
                **self._cache,
            }
        )
        self._cache = {
            past: outputs[present] for past, present in zip(self._past_names, self._present_names, strict=True)
        }
        logits: FloatArray = outputs["logits"].numpy()
        return logits


class _Graph:
    """One opened component."""

    def __init__(
        self, name: str, path: Path, settings: ort.SessionOptions, inputs: list[str], outputs: list[str]
    ) -> None:
        """Opens `path` and checks that it has the inputs and outputs of the contract."""
        self._name = name
        self._outputs = outputs
        if not path.is_file():
            raise BundleError(f"{path} is missing; export the bundle again")
        try:
            self._session = ort.InferenceSession(str(path), sess_options=settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise BundleError(f"{path} cannot be opened ({_one_line(error)}); export the bundle again") from error
        found_inputs = {value.name for value in self._session.get_inputs()}
        missing = sorted(found_inputs ^ set(inputs))
        missing += sorted(set(outputs) - {value.name for value in self._session.get_outputs()})
        if missing:
            raise BundleError(
                f"{path} does not have the inputs and outputs of a {name} ({', '.join(missing[:4])} differ); "
                "export the bundle again"
            )

    def run(self, inputs: _Values) -> _Values:
        """Runs the graph once, without copies between steps."""
        try:
            values = self._session.run_with_ort_values(self._outputs, inputs)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
            raise QavpError(f"ONNX Runtime failed in the {self._name} ({_one_line(error)})") from error
        return dict(zip(self._outputs, values, strict=True))


def _open(
    bundle: Path, manifest: Manifest, name: str, settings: ort.SessionOptions, inputs: list[str], outputs: list[str]
) -> _Graph:
    return _Graph(name, _graph_path(bundle, manifest, name), settings, inputs, outputs)


def session_options(options: EngineOptions) -> ort.SessionOptions:
    """Returns the settings of a session on the CPU.

    Raises:
        InputError: An option is out of range.
    """
    if options.graph_optimization not in _LEVELS:
        raise InputError(f"graph_optimization is {options.graph_optimization!r}; choose one of {', '.join(_LEVELS)}")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; give 1 or more, or leave it out")
    settings = ort.SessionOptions()
    settings.graph_optimization_level = _LEVELS[options.graph_optimization]
    settings.intra_op_num_threads = options.threads or 0  # 0: one per physical core
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if options.graph_optimization == "disable":
        # By default every weight would be cast to float32 before the first layer runs (1.1 GB for CLIP-L, 0.2 GB so).
        settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.log_severity_level = _FATAL  # failures are raised; the log would only repeat them on stderr
    # On load, DequantizeLinear -> MatMul becomes MatMulNBits, which by default also rounds activations to 8
    # bits. 1 keeps them in float32, so that the graph computes what it says.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return settings


def _graph_path(bundle: Path, manifest: Manifest, name: str) -> Path:
    component = manifest.components.get(name)
    if component is None:
        raise BundleError(f"the manifest of {bundle} has no component {name!r}; export the bundle again")
    relative = PurePosixPath(component.file)
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"the manifest of {bundle} names {component.file!r}, a file outside the bundle")
    return bundle / relative


def _input_names(manifest: Manifest, name: str) -> list[str]:
    component = manifest.components.get(name)
    return [] if component is None else [spec.name for spec in component.inputs]


def _cache_names(num_layers: int) -> tuple[list[str], list[str]]:
    kinds = [f"{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
    return [f"past_key_values.{kind}" for kind in kinds], [f"present.{kind}" for kind in kinds]


def _value(array: FloatArray | IntArray, dtype: type[np.float32] | type[np.int64]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype=dtype))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
