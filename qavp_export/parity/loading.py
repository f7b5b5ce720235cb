"""Loads the Hugging Face model that an export is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from qavp_export.checkpoint import Checkpoint, read_config
from qavp_export.families import family_for
from qavp_export.prequantized import quantization_settings
from qavp_export.tracing import build_skeleton
from qavp_export.weights import CheckpointWeights


def load_reference(folder: Path) -> nn.Module:
    """Loads a checkpoint in float32, in evaluation mode, with eager attention.

    transformers reads an ordinary checkpoint. A pre-quantized one it would hand to the quantizer's own library, so its
    weights are read as the exporter reads them and filled into the model without quantization: what a comparison with
    that model shows is the graphs, not the reading of the weights.

    Raises:
        CheckpointError: The checkpoint is quantized in a way that is not supported, or damaged.
    """
    if quantization_settings(read_config(folder)) is not None:
        return _load_dequantized(folder)
    auto: Any = AutoModelForImageTextToText
    with _no_progress_bar():
        model: nn.Module = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model.eval()


def reference_bytes(folder: Path) -> int:
    """Returns what `load_reference` needs at its peak, in bytes, with a margin for one layer's quantization."""
    if quantization_settings(read_config(folder)) is None:
        # float32 weights from 16-bit files, while the file is mapped.
        return 3 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    skeleton, _ = build_skeleton(_config(folder))
    sizes = [4 * parameter.numel() for parameter in skeleton.parameters()]
    # The largest weight is there three times: in the model, as read, and as it is packed.
    return sum(sizes) + 2 * max(sizes)


def _load_dequantized(folder: Path) -> nn.Module:
    checkpoint = Checkpoint.open(folder)
    auto: Any = AutoModelForImageTextToText
    # Initialisers would take minutes to draw what is overwritten; they also tie. Unlike from_pretrained, from_config
    # takes no notice of a quantization_config.
    with no_init_weights():
        model: Any = auto.from_config(_config(folder), dtype=torch.float32, attn_implementation="eager")
    model.tie_weights()
    weights = CheckpointWeights(checkpoint, family_for(checkpoint.config.get("model_type")), model)
    weights.check_stored()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights.holds(name):
                parameter.copy_(torch.from_numpy(weights.tensor(name, tuple(parameter.shape)).numpy()))
            else:
                # A layer that the exported graphs do not use, or tracing would have missed it.
                parameter.zero_()
    reference: nn.Module = model.eval()
    return reference


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    # transformers' own bar would be drawn over the export's.
    logging: Any = transformers_logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
