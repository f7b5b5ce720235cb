"""Loads the Hugging Face model that an export is compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from qavp_export.checkpoint import Checkpoint, read_config
from qavp_export.families import Family, family_of
from qavp_export.prequantized import quantization_settings
from qavp_export.tracing import build_skeleton
from qavp_export.weights import CheckpointWeights


def load_reference(folder: Path, layers: Collection[str], decoder_layers: int | None = None) -> nn.Module:
    """Loads a checkpoint in evaluation mode, with eager attention.

    Linear layers of the decoder and the embedding table stay in the dtype that they are stored in, everything else is
    float32. transformers reads an ordinary checkpoint. A pre-quantized one it would hand to the quantizer's own
    library, so its weights are read as the exporter reads them and filled into the model without quantization: what a
    comparison with that model shows is the graphs, not the reading of the weights.

    Args:
        folder: The checkpoint folder.
        layers: Names of the decoder's linear layers.
        decoder_layers: How many of the decoder's layers are loaded; None for all.

    Raises:
        CheckpointError: The checkpoint is quantized in a way that is not supported, or damaged.
    """
    config = _config(folder, decoder_layers)
    if quantization_settings(read_config(folder)) is not None:
        model = _load_dequantized(folder, config)
    else:
        auto: Any = AutoModelForImageTextToText
        with _quiet():
            model = auto.from_pretrained(
                folder,
                config=config,
                dtype=_stored_dtype(Checkpoint.open(folder)),
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    _to_float(model, layers)
    return model.eval()


def load_clip(folder: Path) -> nn.Module:
    """Loads a `CLIPModel` in evaluation mode and float32, without what nothing reads: the layers of its vision tower.

    Args:
        folder: The checkpoint folder.
    """
    auto: Any = AutoModel
    with _quiet():
        model = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model.vision_model.encoder = nn.Identity()
    clip: nn.Module = model.eval()
    return clip


def load_streamed(
    checkpoint: Checkpoint, family: Family, layers: Collection[str]
) -> tuple[nn.Module, CheckpointWeights]:
    """Builds a checkpoint's decoder with eager attention and without the weights of its linear layers.

    Args:
        checkpoint: The checkpoint.
        family: Its family.
        layers: Names of the decoder's linear layers.

    Returns:
        The model, of which only the decoder behind the embedding can be run, and then only with hooks that give linear
        layers their weights; and what reads these weights.
    """
    config = _config(checkpoint.folder, None)
    config._attn_implementation = "eager"
    model, _ = build_skeleton(config)
    weights = CheckpointWeights(checkpoint, family, model)
    linear = {f"{layer}.weight" for layer in layers}
    modules = {id(module): name for name, module in model.named_modules()}
    for module in family.decoder(model).modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{modules[id(module)]}.{leaf}"
            if parameter.dim() == 1 and name not in linear:
                values = weights.tensor(name, tuple(parameter.shape)).numpy()
                setattr(module, leaf, nn.Parameter(torch.from_numpy(values.copy()), requires_grad=False))
    return model, weights


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype that holds every tensor without loss; config.json may name another than the files have."""
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    return {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}.get(
        frozenset(dtypes), torch.float32
    )


def _to_float(model: Any, layers: Collection[str]) -> None:
    kept = {id(model.get_submodule(layer).weight) for layer in layers if has_module(model, layer)}
    kept.add(id(model.get_input_embeddings().weight))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in kept:
                parameter.data = parameter.data.float()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


def drop_vision(model: Any, family: Family) -> None:
    """Frees what neither the decoder nor the embedding reads."""
    kept = {id(parameter) for parameter in family.decoder(model).parameters()}
    kept.add(id(model.get_input_embeddings().weight))
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = torch.empty(0)


def has_module(model: nn.Module, module: str) -> bool:
    """Whether a model has a module of that name."""
    try:
        model.get_submodule(module)
    except AttributeError:
        return False
    return True


def _load_dequantized(folder: Path, config: Any) -> nn.Module:
    checkpoint = Checkpoint.open(folder)
    auto: Any = AutoModelForImageTextToText
    # Initialisers would take minutes to draw what is overwritten; they also tie. Unlike from_pretrained, from_config
    # takes no notice of a quantization_config.
    with no_init_weights():
        model: Any = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.tie_weights()
    weights = CheckpointWeights(checkpoint, family_of(checkpoint.config), model)
    weights.check_stored()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights.holds(name):
                parameter.copy_(torch.from_numpy(weights.tensor(name, tuple(parameter.shape)).numpy()))
            else:
                # A layer that the exported graphs do not use, or tracing would have missed it.
                parameter.zero_()
    reference: nn.Module = model
    return reference


def _config(folder: Path, decoder_layers: int | None) -> Any:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if decoder_layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = decoder_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:decoder_layers]
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers' own bar would be drawn over the export's; layers that are left out would be reported one by one.
    logging: Any = transformers_logging
    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()
