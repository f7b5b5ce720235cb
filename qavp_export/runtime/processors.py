"""The checkpoint's own tokenizer and image processor, from the bundle's files and nowhere else."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qavp_export.errors import BundleError


def load_processors(folder: Path) -> tuple[Any, Any]:
    """Loads tokenizer and image processor of a bundle or checkpoint with transformers, offline, without remote code.

    Returns:
        The tokenizer and the image processor.

    Raises:
        BundleError: Files are missing or corrupt.
    """
    # Imported here: it takes most of a second, which `import qavp_export` should not.
    transformers: Any = importlib.import_module("transformers")

    loaders: dict[str, Callable[[], Any]] = {
        "tokenizer": lambda: transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ),
        # The PIL backend even where torchvision is installed: the same pixels on every machine.
        "image processor": lambda: transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        ),
    }
    loaded = []
    for what, load in loaders.items():
        try:
            loaded.append(load())
        except Exception as error:  # transformers raises errors of any class on missing or odd files
            reason = " ".join(str(error).split())[:200]
            raise BundleError(
                f"{folder}: the {what} cannot be loaded ({reason}); its files are missing or damaged"
            ) from error
    return loaded[0], loaded[1]
