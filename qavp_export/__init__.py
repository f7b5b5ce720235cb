"""Export LLaVA-family models to pruned, integer W4A4 ONNX bundles, and run them.

`QavpModel`, with `EngineOptions`, is all that production needs; it is imported on first use, and imports neither torch
nor the exporter.
`QavpForImageTextToText`, which needs torch, is a bundle as transformers users expect a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qavp_export.engines import EngineOptions
    from qavp_export.huggingface.modeling import QavpForImageTextToText
    from qavp_export.runtime import QavpModel

__all__ = ["EngineOptions", "QavpForImageTextToText", "QavpModel", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "QavpModel":
        from qavp_export.runtime import QavpModel

        return QavpModel
    if name == "EngineOptions":
        from qavp_export.engines import EngineOptions

        return EngineOptions
    if name == "QavpForImageTextToText":
        from qavp_export.huggingface.modeling import QavpForImageTextToText

        return QavpForImageTextToText
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
