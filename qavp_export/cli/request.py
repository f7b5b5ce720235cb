"""What a command line of `qavp-export` asks for, checked as far as the options alone tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qavp_export.cli.options import ExportOptions
from qavp_export.engines import ENGINES
from qavp_export.engines.tensorrt.targets import FLAVOURS, EngineTargets
from qavp_export.errors import InputError
from qavp_export.recipe import DEFAULT_PRESET, Recipe, check_clip, make_recipe


@dataclass(frozen=True)
class Origin:
    """Where the user says the model is."""

    model: str
    revision: str | None
    offline: bool

    @property
    def name(self) -> str:
        """The model's name without the folders that lead to it."""
        return Path(self.model).name if Path(self.model).exists() else self.model

    def resolve(self, *, config_only: bool, progress: bool) -> Path:
        """Returns the checkpoint folder; downloads it if need be."""
        from qavp_export.hub import resolve_model

        return resolve_model(
            self.model, revision=self.revision, offline=self.offline, config_only=config_only, progress=progress
        ).folder


@dataclass(frozen=True)
class ExportRequest:
    """An export that is asked for.

    Attributes:
        origin: The model.
        recipe: What to do.
        targets: What is built beside the engines of ONNX Runtime.
        clip: The CLIP checkpoint that the scorer `text` needs; None for other scorers.
        calibration: Image prompts; None takes the demo's.
        output: The bundle's folder; None: as `target` names it.
        force: Replace an existing bundle.
        resume: Go on where an interrupted export has stopped.
    """

    origin: Origin
    recipe: Recipe
    targets: EngineTargets
    clip: Origin | None
    calibration: Path | None
    output: Path | None
    force: bool
    resume: bool

    def target(self) -> Path:
        """Returns the bundle's folder."""
        kept = "-".join(f"{fraction:g}" for fraction in self.recipe.keep_range or [self.recipe.keep])
        return self.output or Path(f"{self.origin.name.split('/')[-1]}-keep{kept}-{self.recipe.name}")


def read_request(options: ExportOptions) -> ExportRequest:
    """Reads what options of an export say.

    Raises:
        InputError: An option is missing, malformed, or goes with another one.
        RecipeError: The recipe does not exist, or is not valid.
        UnavailableError: TensorRT-RTX does not build for a compute capability.
    """
    if options.model is None:
        raise InputError("--model is missing; see qavp-export --help")
    overrides = _parse_overrides(options)
    targets = _parse_targets(options)
    recipe = make_recipe(options.recipe or _preset_for(options.format_), overrides)
    check_clip(recipe, given=options.clip is not None)
    return ExportRequest(
        origin=Origin(options.model, options.revision, options.offline),
        recipe=recipe,
        targets=targets,
        clip=None if options.clip is None else Origin(options.clip, None, options.offline),
        calibration=options.calibration,
        output=options.output,
        force=options.force,
        resume=options.resume,
    )


def _parse_overrides(options: ExportOptions) -> dict[str, Any]:
    """Returns the recipe fields that options set; None where they leave one as it is."""
    return {
        **_parse_keep(options.keep),
        "semantic": options.semantic,
        "alpha": options.alpha,
        "outlier_weight": options.outlier_weight,
        "score_input": options.score_input,
        "select": options.select,
        "positions": options.positions,
        "seed": options.seed,
        "group_size": options.group_size,
        "format": options.format_,
        "keep_precision": _parse_precisions(options.keep_precision),
        "calibration_samples": options.calibration_samples,
        "size_budget": options.size_budget,
    }


def _preset_for(format_: str | None) -> str:
    # A format that is asked for alone comes with the recipe that was measured to suit it.
    return "nvfp4" if format_ == "nvfp4" else DEFAULT_PRESET


def _parse_keep(option: str | None) -> dict[str, Any]:
    """Returns the recipe fields that `--keep` sets."""
    if option is None:
        return {}
    try:
        bounds = [float(bound) for bound in option.split(":")]
    except ValueError:
        bounds = []
    if len(bounds) == 1:
        return {"keep": bounds[0]}
    if len(bounds) == 2:
        return {"keep_range": (bounds[0], bounds[1])}
    raise InputError(f"--keep {option[:40]!r} is neither a fraction, like 0.125, nor a range, like 0.05:0.5")


def _parse_precisions(options: list[str] | None) -> dict[str, str] | None:
    if not options:
        return None
    parsed: dict[str, str] = {}
    for option in options:
        pattern, equals, precision = option.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"--keep-precision {option!r} is not PATTERN=PRECISION, like layers.0.mlp.down_proj=w8a8")
        parsed[pattern] = precision
    return parsed


def _parse_targets(options: ExportOptions) -> EngineTargets:
    """Returns what is built beside the engines of ONNX Runtime.

    Raises:
        InputError: An engine does not exist, or an option goes with none that is built.
        UnavailableError: TensorRT-RTX does not build for a compute capability.
    """
    names = _split(options.engine)
    # Whoever names the engines of ONNX Runtime gets what is built anyway.
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise InputError(f"--engine {unknown[0][:40]!r} does not exist; choose from {', '.join(ENGINES)}")
    numbers = _split(options.sm)
    if not all(number.isdecimal() for number in numbers):
        raise InputError(f"--sm {','.join(numbers)[:40]!r} is no compute capability, like 89 for 8.9")
    flavours = tuple(flavour for flavour in FLAVOURS if flavour in names)
    settings = {"max_tokens": options.max_tokens, "max_batch": options.max_batch}
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    if given and not flavours:
        raise InputError(f"{given[0]} goes with --engine tensorrt or tensorrt-rtx")
    targets = EngineTargets(
        flavours,
        tuple(sorted({int(number) for number in numbers})),
        allow_precision_fallback=options.allow_precision_fallback,
        capability_report=options.capability_report,
        **{name: value for name, value in settings.items() if value is not None},
    )
    targets.check()
    return targets


def _split(options: list[str] | None) -> list[str]:
    return [part.strip() for option in options or [] for part in option.split(",") if part.strip()]
