"""Builds a Hugging Face model whose parameters have shapes and no data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.initialization import no_init_weights


@contextmanager
def _fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    # Only parameters become fake: buffers that no checkpoint holds (rotary frequencies, position ids) are
    # computed by the model's constructor and must keep their values.
    register = nn.Module.register_parameter

    def register_fake(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not isinstance(param, FakeTensor):
            with mode:
                fake = torch.empty(param.shape, dtype=param.dtype, device="cpu")
            self._parameters[name] = nn.Parameter(fake, requires_grad=False)

    nn.Module.register_parameter = register_fake  # type: ignore[method-assign]
    try:
        # Initialisers draw and test random numbers, which parameters without data do not have; they also tie.
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(config: Any) -> tuple[nn.Module, FakeTensorMode]:
    """Builds the model that `config` describes, in float32, without allocating its weights.

    Args:
        config: A Hugging Face configuration.

    Returns:
        The model in evaluation mode and the fake tensor mode that its parameters belong to.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # A copy: building a model writes its dtype into the configuration.
    auto: Any = AutoModelForImageTextToText
    with _fake_parameters(mode):
        model = auto.from_config(copy.deepcopy(config), dtype=torch.float32)
    model.tie_weights()
    return model.eval(), mode


def build_clip_skeleton(config: Any, mode: FakeTensorMode) -> nn.Module:
    """Builds the `CLIPModel` that `config` describes, in float32, without allocating its weights.

    Args:
        config: A `CLIPConfig`.
        mode: The fake tensor mode of the parameters, that of the model that CLIP is traced with.

    Returns:
        The model in evaluation mode.
    """
    auto: Any = AutoModel
    with _fake_parameters(mode):
        model: nn.Module = auto.from_config(copy.deepcopy(config), dtype=torch.float32)
    return model.eval()
