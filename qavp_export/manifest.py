"""The bundle's manifest, `qavp.json`: what a bundle holds, how it was made, and what was measured.

Standard library only: the exporter writes it and the production runtime, which has neither torch nor pydantic,
reads it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qavp_export.errors import BundleError

MANIFEST_NAME = "qavp.json"
SCHEMA_VERSION = 3

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component: its name, ONNX dtype name and shape (a string is a dynamic axis)."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Component:
    """One ONNX graph of the bundle.

    Attributes:
        file: Path of the graph inside the bundle, with forward slashes.
        inputs: Graph inputs in order.
        outputs: Graph outputs in order.
    """

    file: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


@dataclass(frozen=True)
class Question:
    """How the vision encoder reads the question that it scores tokens by: its input `text_input_ids`.

    Attributes:
        source: The CLIP checkpoint as the user named it (a folder is given by its last component only).
        tokenizer: Folder of CLIP's tokenizer inside the bundle.
        context_length: Most tokens of a question; a longer one is cut.
        eos_token_id: Ends a question, and pads it on the right where it is shorter than others of its batch.
    """

    source: str
    tokenizer: str
    context_length: int
    eos_token_id: int


@dataclass(frozen=True)
class VisionTokens:
    """What happens to the vision tokens.

    A *unit* is what the keep ratio applies to: one selection of k of its N tokens.

    Attributes:
        before: Tokens per unit that the vision projector yields (N); None if they vary with the image.
        after: Tokens per unit that reach the decoder (k); None if they vary or are chosen at run time.
        image_token: Text of the placeholder that image features replace.
        image_token_id: Its token id.
        positions: `contiguous` or `original`: how position ids of the shortened prompt are numbered.
        keep: The share of tokens that survives unless the caller chooses another.
        keep_range: Least and largest share that can be chosen at run time; None if none can.
        layout: How images become units: `grid`, `tiles` or `native`, see `families.base.Family`.
        layout_settings: What the layout needs to know of the model's configuration.
        unit: What a unit is: `image`, `tile` (one picture that the vision tower sees: the whole image where the
            processor does not cut it up), or `tile-set`, all tiles of one image.
        newlines: Whether learned tokens that end the rows of a tile-set are `kept`, as in an unpruned sequence, or
            `dropped`; None if there are none.
        question: How the question is read by which tokens are scored; None if none is.
    """

    before: int | None
    after: int | None
    image_token: str
    image_token_id: int
    positions: str
    keep: float
    keep_range: list[float] | None = None
    layout: str = "grid"
    layout_settings: dict[str, Any] = field(default_factory=dict)
    unit: str = "tile"
    newlines: str | None = None
    question: Question | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes of the decoder that the runtime needs.

    Attributes:
        num_layers: Number of `past_key_values.%d` pairs.
        num_key_value_heads: Heads of each key and value.
        head_dim: Channels of each head.
        hidden_size: Channels of `inputs_embeds` and `image_features`.
        vocab_size: Last axis of `logits`.
        context_length: Longest sequence of vision and text tokens, prompt and answer together.
        eos_token_ids: Ids that end an answer.
        pad_token_id: Id used for left padding.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    pad_token_id: int


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: path with forward slashes, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that `qavp.json` says.

    Attributes:
        source: The model as the user named it (a folder is given by its last component only).
        family: The model family that exported it, for example `llava`.
        recipe: The recipe, field by field.
        vision_tokens: Tokens before and after pruning.
        decoder: Sizes of the decoder.
        components: The graphs by component name: `vision_encoder`, `embedding`, `decoder`.
        precision: Realized precision by layer, for example `{"/model/layers.0/mlp/up_proj/MatMul": "w4a4"}`.
        weight_error: Relative error `norm2(W - W^) / norm2(W)` of each rounded weight, by module name.
        notes: What the recipe asked for and the model did not allow, a line each.
        calibration: What the recipe was calibrated on: name and SHA-256 of the data, number of prompts, and the
            measured sensitivity of each layer, by module name, if the recipe asks for it. None without calibration.
        alpha_fit: How alpha and outlier_weight were chosen, if the recipe left that to the export: number of images,
            each candidate's KL divergence and top-1 agreement, the choice.
        checkpoint_bytes: Size of the checkpoint's tensors.
        checkpoint_quantization: How the checkpoint itself stores quantized weights; None if they are floats.
        parity: What the parity check compared and found.
        engines: What was built for each engine, by name: its folder, how many layers of each graph run in which
            precision, and what could not be lowered.
        versions: Versions of qavp-export and the libraries that wrote the graphs.
        files: Every other file of the bundle.
        schema_version: Version of this layout.
    """

    source: str
    family: str
    recipe: dict[str, Any]
    vision_tokens: VisionTokens
    decoder: DecoderSpec
    components: dict[str, Component]
    precision: dict[str, str]
    weight_error: dict[str, float]
    notes: list[str]
    calibration: dict[str, Any] | None
    checkpoint_bytes: int
    checkpoint_quantization: dict[str, Any] | None
    parity: dict[str, Any]
    versions: dict[str, str]
    alpha_fit: dict[str, Any] | None = None
    engines: dict[str, Any] = field(default_factory=dict)
    files: list[FileEntry] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Returns the manifest as indented JSON that ends with a newline."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Reads the manifest of a bundle folder.

        Raises:
            BundleError: The folder holds no manifest, or one that this version cannot read.
        """
        path = bundle / MANIFEST_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(
                f"{bundle} is not a bundle: it has no {MANIFEST_NAME}; make one with qavp-export"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version!r}, this qavp-export reads {SCHEMA_VERSION}; "
                "export the bundle again or install the version that wrote it"
            )
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} is incomplete ({error}); export the bundle again") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> Manifest:
        fields = dict(data)
        tokens = dict(data["vision_tokens"])
        if tokens.get("question") is not None:
            tokens["question"] = _section(Question, tokens["question"])
        fields["vision_tokens"] = _section(VisionTokens, tokens)
        fields["decoder"] = _section(DecoderSpec, data["decoder"])
        fields["components"] = {
            name: Component(
                file=value["file"],
                inputs=[_section(TensorSpec, spec) for spec in value["inputs"]],
                outputs=[_section(TensorSpec, spec) for spec in value["outputs"]],
            )
            for name, value in data["components"].items()
        }
        fields["files"] = [_section(FileEntry, entry) for entry in data["files"]]
        return cls(**fields)


def _section(kind: type[_Section], data: dict[str, Any]) -> _Section:
    return kind(**data)
