"""Gives the graphs their weights: lazy tensors that read the checkpoint one weight at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
import onnx_ir as ir
from torch import nn

from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import CheckpointError
from qavp_export.prequantized import Layout, ModuleTensors, find_layout
from qavp_export.safetensors_index import shown
from qavp_export.tracing.naming import CLIP

_IR_DTYPES: Mapping[str, ir.DataType] = MappingProxyType(
    {"F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT}
)


class Spelling(Protocol):
    """Knows how checkpoints spell parameter names."""

    def parameter_names(self, checkpoint_names: Iterable[str]) -> dict[str, str]:
        """Maps parameter names to the names of the checkpoint's tensors; see `Family.parameter_names`."""


class CheckpointWeights:
    """Finds a parameter's tensors in a checkpoint, whatever layout its names follow.

    A weight that another tool has quantized is several tensors; it is given as the float32 weight that they stand for.

    Args:
        checkpoint: The checkpoint.
        family: Knows how checkpoints spell parameter names: a `Family`, or a `TextTower`.
        skeleton: The Hugging Face model; parameters that it ties share one tensor.

    Attributes:
        prequantized: How the checkpoint stores quantized weights; None if all are floats.

    Raises:
        CheckpointError: The checkpoint has quantized weights in a layout that is not supported, or two tensors that
            claim one parameter.
    """

    def __init__(self, checkpoint: Checkpoint, family: Spelling, skeleton: nn.Module) -> None:
        self._checkpoint = checkpoint
        self._names = family.parameter_names(checkpoint.tensors)
        layout = find_layout(checkpoint.config)
        self._modules = {} if layout is None else self._quantized_modules(layout)
        # What is stored decides: some tools leave the configuration behind when they convert weights back to floats.
        self.prequantized = layout if self._modules else None
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
            CheckpointError: Tensors have another shape or dtype, or a quantized weight lacks one of its tensors;
                the message names them.
        """
        self.check({name: shape for name, shape in self._shapes.items() if self.holds(name)})

    def check(self, parameters: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the checkpoint holds every parameter in the right shape; reads no weight.

        Args:
            parameters: Shapes by parameter name.

        Raises:
            CheckpointError: Tensors are missing or have another shape; the message names them.
        """
        expected: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, Collection[str]] = {}
        for name, shape in parameters.items():
            tensors = self._quantized(name)
            if self.prequantized is None or tensors is None:
                expected[self._source(name)] = shape
                continue
            for source, part in self.prequantized.parts(tensors, shape).items():
                expected[source], dtypes[source] = part.shape, part.dtypes
        self._checkpoint.check_expected(expected, dtypes)

    def tensor(self, parameter: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """Returns a lazy float32 tensor; reading it raises CheckpointError if the weight is not finite."""
        layout, tensors, source = self.prequantized, self._quantized(parameter), self._source(parameter)

        def read() -> ir.TensorProtocol:
            if layout is not None and tensors is not None:
                return ir.Tensor(layout.read(tensors, shape), name=parameter)
            array = self._checkpoint.read_checked(source, shape)
            return ir.Tensor(array.astype(np.float32, copy=False), name=parameter)

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=parameter)

    def holds(self, parameter: str) -> bool:
        """Whether the checkpoint has a parameter, as floats or quantized."""
        return self.is_prequantized(parameter) or self._source(parameter) in self._checkpoint.tensors

    def is_prequantized(self, parameter: str) -> bool:
        """Whether the checkpoint stores a parameter quantized."""
        return self._quantized(parameter) is not None

    def stored_dtype(self, parameter: str) -> ir.DataType:
        """Returns the smallest dtype that holds a parameter's values without loss; float64 counts as float32.

        For an ordinary weight that is the dtype it is stored in. For a quantized weight it is float32: a product of a
        code and a scale does not fit the 16 bits of the scale, and rounded to them it would leave the grid that its
        quantizer chose (8-bit codes with bfloat16 scales: by up to half a step).
        """
        info = self._checkpoint.tensors.get(self._source(parameter))
        return _IR_DTYPES.get(info.dtype, ir.DataType.FLOAT) if info is not None else ir.DataType.FLOAT

    def _source(self, parameter: str) -> str:
        # A checkpoint stores tied tensors once, under either name.
        for name in self._tied.get(parameter, [parameter]):
            if name in self._names:
                return self._names[name]
        return parameter

    def _quantized(self, parameter: str) -> ModuleTensors | None:
        for name in self._tied.get(parameter, [parameter]):
            if name in self._modules:
                return self._modules[name]
            if name in self._names:
                return None
        return None

    def _quantized_modules(self, layout: Layout) -> dict[str, ModuleTensors]:
        """Returns the quantized modules by the parameter that their tensors stand for."""
        modules: dict[str, ModuleTensors] = {}
        for name, source in self._names.items():
            module, _, part = name.rpartition(".")
            if not layout.is_part(part, self._checkpoint.tensors[source].dtype):
                continue
            parameter = f"{module}.weight"
            ordinary = self._names.get(parameter)
            if ordinary is not None and layout.weight_dtype is None:
                raise CheckpointError(
                    f"tensors {shown(ordinary)} and {shown(source)} of the checkpoint both mean {shown(parameter)}; "
                    "remove one of the two"
                )
            # Renames change how a module is called, not its parts.
            modules[parameter] = ModuleTensors(self._checkpoint, source.removesuffix(f".{part}"))
        return modules


class JoinedWeights:
    """The weights of a model and of the CLIP that its tokens are compared with a question by.

    Args:
        model: The model's weights.
        clip: CLIP's; the names of its parameters begin with "clip.".

    Attributes:
        prequantized: How the model's checkpoint stores quantized weights; None if all are floats.
    """

    def __init__(self, model: CheckpointWeights, clip: CheckpointWeights) -> None:
        self._model = model
        self._clip = clip
        self.prequantized = model.prequantized

    def check(self, parameters: Mapping[str, tuple[int, ...]]) -> None:
        """See `CheckpointWeights.check`."""
        for weights in (self._model, self._clip):
            weights.check({name: shape for name, shape in parameters.items() if self._of(name) is weights})

    def tensor(self, parameter: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """See `CheckpointWeights.tensor`."""
        return self._of(parameter).tensor(parameter, shape)

    def stored_dtype(self, parameter: str) -> ir.DataType:
        """See `CheckpointWeights.stored_dtype`."""
        return self._of(parameter).stored_dtype(parameter)

    def _of(self, parameter: str) -> CheckpointWeights:
        return self._clip if parameter.startswith(f"{CLIP}.") else self._model
