"""The recipe: everything that shapes an export, checked before any weight is read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from qavp_export.errors import RecipeError
from qavp_export.numerics.score import ScoreInput
from qavp_export.numerics.select import Select
from qavp_export.numerics.semantic import Scorer
from qavp_export.safetensors_index import shown

Precision: TypeAlias = Literal["w4a4", "w4a8", "w4a16", "w8a8", "w8a16", "float"]

DEFAULT_PRESET = "rotate"
# The order of `--list-recipes`.
PRESETS = ("rtn", "rotate", "gptq", "auto", "w4a8", "w4a16", "w8a8", "nvfp4", "none")

_RECIPE_LIMIT = 1_000_000


class Recipe(BaseModel):
    """Everything that shapes the result; the same recipe and checkpoint give byte-identical graphs and weights.

    Each field says what it is; `qavp-export --list-recipes` prints that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default=DEFAULT_PRESET, description="The preset that the recipe started from.")
    keep: float = Field(
        default=0.125,
        gt=0,
        le=1,
        description="Fraction of vision tokens kept, in (0, 1]; k = max(1, floor(keep * N + 0.5)). With a keep_range, "
        "what is kept unless a call asks for another.",
    )
    keep_range: tuple[float, float] | None = Field(
        default=None,
        description="Lowest and highest fraction that one bundle serves, in (0, 1]: k is then an input of its vision "
        "encoder; null fixes k.",
    )
    semantic: Scorer | None = Field(
        default=None,
        description="Semantic scorer; null takes the family's default. text compares tokens with the question by CLIP "
        "(CDPruner) and needs --clip.",
    )
    alpha: float | Literal["auto"] = Field(
        default=0.5,
        description="Weight of semantic relevance against quantization sensitivity (QAPruner, equation for S), in "
        "[0, 1]; auto chooses it and outlier_weight on calibration images, by fidelity.",
    )
    outlier_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of outlier intensity against quantization error within that sensitivity; the paper's is "
        "0.5.",
    )
    score_input: ScoreInput = Field(
        default="raw",
        description="raw scores the projected tokens as they are (the paper); rms divides each by its root mean "
        "square, which is what the decoder's quantizers see.",
    )
    select: Select = Field(
        default="dpp",
        description="Selection rule: dpp takes tokens of high score that differ, by a determinantal point process "
        "(CDPruner); topk the k highest scores (QAPruner); maxmin tokens that differ most, whatever their scores.",
    )
    positions: Literal["contiguous", "original"] = Field(
        default="contiguous",
        description="contiguous numbers the shortened prompt 0, 1, 2, ... (the paper); original keeps each token's "
        "position in the unpruned prompt.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Seed of the random scorer, the rotations' signs and the calibration draw.",
    )
    group_size: int | None = Field(
        default=None,
        ge=8,
        le=1024,
        description="Channels that share a scale, in the score and in the decoder; null takes the largest of 128, 64, "
        "32, 16 that divides every channel count.",
    )
    decoder: Precision = Field(
        default="w4a4",
        description="Precision of the decoder's linear layers, bits of weights and activations: w4a4, w4a8, w4a16, "
        "w8a8, w8a16 or float.",
    )
    lm_head: Precision = Field(default="w8a16", description="Precision of the output projection.")
    keep_precision: dict[str, Precision] = Field(
        default_factory=dict,
        description="Precision of layers by a pattern over their Hugging Face names, for example "
        "{layers.0.mlp.down_proj: w8a8}; the first match wins over decoder and lm_head.",
    )
    format: Literal["int", "nvfp4"] = Field(
        default="int",
        description="int stores integers with group scales; nvfp4 stores FP4 with FP8 scales per 16 channels, for "
        "NVIDIA GPUs of compute capability 10 and up.",
    )
    scales: Literal["two-level", "one-level"] = Field(
        default="two-level",
        description="Group scales of 4-bit tensors: integer multiples of one step per vector, which lets a layer run "
        "as one integer product, or one float per group.",
    )
    rotation: Literal["hadamard", "none"] = Field(
        default="hadamard", description="Hadamard rotations of the decoder that spread outlier channels (QuaRot)."
    )
    algorithm: Literal["rtn", "sink", "gptq"] = Field(
        default="sink",
        description="How 4-bit weights are rounded: rtn to the nearest code; sink so that the outputs of a sequence's "
        "first token are kept, which needs no data; gptq by error compensation on calibration prompts.",
    )
    clip_search: bool = Field(
        default=True,
        description="Choose 4-bit weight scales for the least squared error, not the largest value; algorithms sink "
        "and gptq always do.",
    )
    calibration_samples: int = Field(
        default=128, ge=1, le=100_000, description="Most prompts that are drawn for calibration."
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="GPTQ: share of the Hessian's mean diagonal that is added to its diagonal.",
    )
    activation_order: bool = Field(
        default=True, description="GPTQ: round the input channels with the largest activations first."
    )
    size_budget: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Raise the layers that lose most on the calibration prompts to 8 bit, as long as the decoder's "
        "weights grow by at most this fraction; null raises none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_within_range(cls, fields: Any) -> Any:
        bounds = fields.get("keep_range") if isinstance(fields, dict) else None
        if not isinstance(bounds, list | tuple) or "keep" in fields or not _is_range(bounds):
            return fields
        return fields | {"keep": min(max(cls.model_fields["keep"].default, bounds[0]), bounds[1])}

    @field_validator("alpha", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> float | Literal["auto"]:
        message = "give a number in [0, 1], or auto"
        try:
            alpha: float | Literal["auto"] = validate(value)
        except ValidationError:
            # A union's own errors name its members, one each.
            raise ValueError(message) from None
        if alpha != "auto" and not 0 <= alpha <= 1:
            raise ValueError(message)
        return alpha

    @field_validator("keep_range")
    @classmethod
    def _ascending(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not _is_range(bounds):
            raise ValueError("give two ascending fractions in (0, 1], such as 0.05 and 0.5")
        return bounds

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.keep_range is not None and not self.keep_range[0] <= self.keep <= self.keep_range[1]:
            low, high = self.keep_range
            raise ValueError(f"keep {self.keep:g} is outside keep_range {low:g} to {high:g}")
        if self.format == "nvfp4" and (self.decoder != "w4a4" or self.needs_calibration):
            raise ValueError("format nvfp4 goes with decoder w4a4, no GPTQ, no size_budget and no alpha auto")
        if self.size_budget is not None and not self.decoder.startswith("w4"):
            raise ValueError("size_budget raises 4-bit layers: it goes with decoder w4a4, w4a8 or w4a16")
        if self.algorithm == "gptq" and not self.decoder.startswith("w4"):
            raise ValueError("algorithm gptq rounds 4-bit weights: it goes with decoder w4a4, w4a8 or w4a16")
        if self.fits_alpha:
            self._check_fit()
        return self

    def _check_fit(self) -> None:
        if self.select == "maxmin":
            raise ValueError(
                "alpha auto weighs scores, and select maxmin ignores them; use topk or dpp, or set no alpha"
            )
        if self.keep_range is not None:
            raise ValueError("alpha auto fits one share of tokens, not a keep_range; give keep, or a number for alpha")
        if "outlier_weight" in self.model_fields_set:
            raise ValueError("alpha auto chooses outlier_weight too; leave outlier_weight out, or give alpha a number")

    @property
    def fits_alpha(self) -> bool:
        """Whether an export chooses alpha and outlier_weight."""
        return self.alpha == "auto"

    @property
    def calibrates_decoder(self) -> bool:
        """Whether the decoder is quantized by calibration prompts."""
        return self.algorithm == "gptq" or self.size_budget is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether an export runs calibration prompts."""
        return self.calibrates_decoder or self.fits_alpha


def make_recipe(preset: str, overrides: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from a preset and the fields that the user set.

    How much is kept is one choice: a `keep` or `keep_range` that the user set replaces both of the preset.

    Args:
        preset: One of `PRESETS`, or the path of a YAML file like theirs.
        overrides: Recipe fields; a None value counts as not set.

    Raises:
        RecipeError: Unknown preset or field, or a value out of range; the message names the first field at fault.
    """
    fields = read_preset(preset)
    fields.pop("description", None)
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.keys() & {"keep", "keep_range"}:
        fields = {key: value for key, value in fields.items() if key not in ("keep", "keep_range")}
    fields |= given
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if not field:
            raise RecipeError(message) from error
        message = message[:1].lower() + message[1:]
        raise RecipeError(f"{field} = {shown(reprlib.repr(first['input']))} is not valid: {message}") from error


def check_clip(recipe: Recipe, *, given: bool) -> None:
    """Checks that a CLIP checkpoint is there if a recipe needs one, and only then.

    Raises:
        RecipeError: It is not.
    """
    if recipe.semantic == "text" and not given:
        raise RecipeError(
            "semantic 'text' needs CLIP's text tower, which the checkpoint does not hold; give --clip CHECKPOINT, the "
            "CLIP model that the vision tower comes from"
        )
    if given and recipe.semantic != "text":
        raise RecipeError("--clip is read by semantic 'text' alone; add --semantic text, or leave --clip out")


def describe_fields() -> dict[str, dict[str, Any]]:
    """Returns default and meaning of every recipe field, as JSON values."""
    described = {}
    for name, field in Recipe.model_fields.items():
        default = field.get_default(call_default_factory=True)
        described[name] = {"default": default, "meaning": field.description}
    return described


def read_preset(preset: str) -> dict[str, Any]:
    """Reads what a preset or a recipe file sets, `name` included.

    Raises:
        RecipeError: There is none of that name, or it is not a YAML mapping.
    """
    if preset in PRESETS:
        text, name = files("qavp_export.presets").joinpath(f"{preset}.yaml").read_text(encoding="utf-8"), preset
    else:
        path = Path(preset)
        if path.suffix not in (".yaml", ".yml"):
            raise RecipeError(f"unknown recipe {preset!r}; choose one of {', '.join(PRESETS)}, or give a .yaml file")
        text, name = _read(path), path.stem
    try:
        fields = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a 13th month, 5,000 digits, nested too deeply
        raise RecipeError(f"recipe {preset} is not valid YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"recipe {preset} is not a mapping of fields; see qavp-export --list-recipes")
    return {"name": name} | fields


def _is_range(bounds: Sequence[Any]) -> bool:
    numbers = len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)
    return numbers and 0 < bounds[0] < bounds[1] <= 1


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _RECIPE_LIMIT:
            raise RecipeError(f"recipe {path} is larger than {_RECIPE_LIMIT} bytes; that is no recipe")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read ({error}); check the path") from error
