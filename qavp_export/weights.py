"""Gives the graphs their weights: lazy tensors that read the checkpoint one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from torch import nn

from qavp_export.checkpoint import Checkpoint
from qavp_export.families import Family

_IR_DTYPES: Mapping[str, ir.DataType] = MappingProxyType(
    {"F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT}
)


class CheckpointWeights:
    """Finds a parameter's tensor in a checkpoint, whatever layout its names follow.

    Args:
        checkpoint: The checkpoint.
        family: Knows how checkpoints spell parameter names.
        skeleton: The Hugging Face model; parameters that it ties share one tensor.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, skeleton: nn.Module) -> None:
        self._checkpoint = checkpoint
        self._names = family.parameter_names(checkpoint.tensors)
        self._tied: dict[str, list[str]] = {}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        groups: dict[int, list[str]] = {}
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            group = groups.setdefault(id(parameter), [])
            group.append(name)
            self._tied[name] = group

    def check_stored(self) -> None:
        """Checks shapes and dtypes of the parameters that the checkpoint holds; reads no weight.

        Raises:
            CheckpointError: Tensors have another shape or dtype; the message names them.
        """
        self.check(
            {name: shape for name, shape in self._shapes.items() if self._source(name) in self._checkpoint.tensors}
        )

    def check(self, parameters: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the checkpoint holds every parameter in the right shape; reads no weight.

        Args:
            parameters: Shapes by parameter name.

        Raises:
            CheckpointError: Tensors are missing or have another shape; the message names them.
        """
        self._checkpoint.check_expected({self._source(name): shape for name, shape in parameters.items()})

    def tensor(self, parameter: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """Returns a lazy float32 tensor; reading it raises CheckpointError if the weight is not finite."""
        source = self._source(parameter)

        def read() -> ir.TensorProtocol:
            array = self._checkpoint.read_checked(source, shape)
            return ir.Tensor(array.astype(np.float32, copy=False), name=parameter)

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=parameter)

    def stored_dtype(self, parameter: str) -> ir.DataType:
        """Returns the dtype that the checkpoint stores a parameter in; float64 counts as float32."""
        info = self._checkpoint.tensors.get(self._source(parameter))
        return _IR_DTYPES.get(info.dtype, ir.DataType.FLOAT) if info is not None else ir.DataType.FLOAT

    def _source(self, parameter: str) -> str:
        # A checkpoint stores tied tensors once, under either name.
        for name in self._tied.get(parameter, [parameter]):
            if name in self._names:
                return self._names[name]
        return parameter
