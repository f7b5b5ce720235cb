"""How lmms-eval finds the model `qavp`: an entry point of the group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def models() -> Any:
    """Returns lmms-eval's manifest of the model `qavp`; the classes are imported when the model is used."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest(
        model_id="qavp",
        simple_class_path="qavp_export.evaluate.lmms.QavpSimple",
        chat_class_path="qavp_export.evaluate.lmms.QavpChat",
    )
