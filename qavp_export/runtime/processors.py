"""The checkpoint's own processor (tokenizer and image processor), from the bundle's files and nowhere else."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qavp_export.errors import BundleError

# Where transformers' AutoProcessor finds the name of the processor's class.
_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
# What SmolVLMProcessor does with images is Idefics3Processor's, and for video it needs a package of its own.
_SAME_FOR_IMAGES: Mapping[str, str] = MappingProxyType({"SmolVLMProcessor": "Idefics3Processor"})


def load_processor(folder: Path) -> Any:
    """Loads the processor of a bundle or checkpoint with transformers, offline, without remote code.

    transformers' `AutoProcessor` also loads a video processor where there is one, which needs torchvision; here the
    processor's class gets a tokenizer and an image processor alone, the latter with the PIL backend: no torch, and the
    same pixels on every machine.

    Returns:
        A transformers `ProcessorMixin` with the attributes `tokenizer` and `image_processor`.

    Raises:
        BundleError: Files are missing or corrupt, or name a processor that transformers does not have.
    """
    # Imported here: it takes most of a second, which `import qavp_export` should not.
    transformers: Any = importlib.import_module("transformers")
    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = load_tokenizer(folder)
    images = _load(
        folder,
        "image processor",
        lambda: transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **local),
    )
    return _load(folder, "processor", lambda: _assemble(folder, tokenizer, images))


def load_tokenizer(folder: Path) -> Any:
    """Loads a tokenizer alone, as `load_processor` does.

    Raises:
        BundleError: Files are missing or corrupt.
    """
    auto: Any = importlib.import_module("transformers").AutoTokenizer
    local = {"local_files_only": True, "trust_remote_code": False}
    return _load(folder, "tokenizer", lambda: auto.from_pretrained(folder, **local))


def _load(folder: Path, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # transformers raises errors of any class on missing or odd files
        reason = " ".join(str(error).split())[:200]
        raise BundleError(
            f"{folder}: the {what} cannot be loaded ({reason}); its files are missing or damaged"
        ) from error


def _assemble(folder: Path, tokenizer: Any, image_processor: Any) -> Any:
    kind = _image_only(_find_class(folder))
    settings, _ = kind.get_processor_dict(folder, local_files_only=True)
    accepted = inspect.signature(kind.__init__).parameters
    settings |= _from_config(folder, {name for name in accepted if settings.get(name) is None})
    if "video_processor" in accepted:
        settings["video_processor"] = None
    return kind.from_args_and_dict([image_processor, tokenizer], settings)


def _find_class(folder: Path) -> Any:
    """Returns the class that the files name, else the one of the model type, as AutoProcessor does."""
    files = [json.loads((folder / name).read_text("utf-8")) for name in _NAMED_IN if (folder / name).is_file()]
    named = [settings["processor_class"] for settings in files if settings.get("processor_class")]
    if named:
        name = named[0]
    else:
        auto: Any = importlib.import_module("transformers.models.auto.processing_auto")
        name = auto.PROCESSOR_MAPPING_NAMES[json.loads((folder / "config.json").read_text("utf-8"))["model_type"]]
    if name == "PixtralProcessor":
        return importlib.import_module("qavp_export.runtime.pixtral").PixtralProcessor
    transformers: Any = importlib.import_module("transformers")
    found = getattr(transformers, _SAME_FOR_IMAGES.get(name, name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.ProcessorMixin)):
        raise ValueError(f"transformers {transformers.__version__} has no processor {name!r}")
    return found


def _image_only(kind: Any) -> Any:
    """Returns the class, or where it would also take a video processor a subclass that does not."""
    parts = kind.get_attributes()
    if "video_processor" not in parts:
        return kind
    kept = [part for part in parts if part != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: kept)})


def _from_config(folder: Path, missing: set[str]) -> dict[str, Any]:
    """Reads from config.json what processors of older LLaVA checkpoints leave out, of the settings in `missing`."""
    missing &= {"patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"}
    if not missing:
        return {}
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    values = {
        "patch_size": config.vision_config.patch_size,
        # VipLLaVA, which has no such setting, drops the [CLS] token.
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
        # CLIP's [CLS].
        "num_additional_image_tokens": int(config.vision_config.model_type == "clip_vision_model"),
    }
    return {name: values[name] for name in missing}
