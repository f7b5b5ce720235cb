"""Rewrites linear layers to NVFP4: FP4 weights, and activations quantized to FP4 at run time."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import numpy as np
import onnx.parser
import onnx_ir as ir

from qavp_export.numerics.nvfp4 import BLOCK_SIZE, RANGE, SMALLEST_SCALE, Nvfp4, quantize_nvfp4_weight
from qavp_export.passes._builder import Dim, NodeBuilder
from qavp_export.passes._infra import Refusal, RewritePass, RewriteResult, require_opset
from qavp_export.passes._linear import (
    ReadByAll,
    by_output_channel,
    graph_of,
    input_of,
    is_linear,
    matrix_shape,
    weight_part,
    why_not_quantizable,
)

# The first with FLOAT4E2M1.
MINIMUM_OPSET = 23
MINIMUM_IR_VERSION = 11

DOMAIN = "trt"
OP_TYPE = "TRT_FP4DynamicQuantize"

# numerics/nvfp4.py, operator for operator; 17 is FLOAT8E4M3FN and 23 FLOAT4E2M1.
_BODY = f"""
<domain: "{DOMAIN}", opset_import: ["" : OPSET]>
{OP_TYPE} <axis, block_size, scale_type> (x, tensor_scale) => (codes, block_scales)
{{
  last = Constant <value_ints: ints = [-1]> ()
  zero = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  six = Constant <value_float: float = 6.0> ()
  size = Constant <value_int: int = @block_size> ()
  sizes = Reshape (size, last)
  leading = Shape <start: int = 0, end: int = -1> (x)
  blocked_shape = Concat <axis: int = 0> (leading, last, sizes)
  magnitude = Abs (x)
  blocks = Reshape (magnitude, blocked_shape)
  peak = ReduceMax <keepdims: int = 0> (blocks, last)
  amplitude = Div (peak, six)
  block_scales = QuantizeLinear <output_dtype: int = @scale_type> (amplitude, tensor_scale)
  scale = DequantizeLinear (block_scales, tensor_scale)
  positive = Greater (scale, zero)
  divisor = Where (positive, scale, one)
  codes = QuantizeLinear <axis: int = @axis, block_size: int = @block_size, output_dtype: int = 23> (x, divisor)
}}
"""


class PlaceNvfp4(RewritePass):
    """Rewrites `MatMul(x, weight)` with a constant weight `[K,N]` to multiply FP4 by FP4, in blocks of 16 along K.

    1. Weights become codes `[N,K]` FLOAT4E2M1, block scales `[N,K/16]` FLOAT8E4M3FN and one float scale `[]`, behind
       two DequantizeLinear and a Transpose. All three are lazy: a weight is read and quantized once, when the model
       is saved.
    2. Activations `x [...,K]` are divided by a scale per token, `max abs / (6 * 448) [...,1]`, and become codes and
       block scales in `trt.TRT_FP4DynamicQuantize`, again behind two DequantizeLinear. Linear layers that share an
       input share all of this.
    3. The product is multiplied by the tokens' scales.

    This is the form that TensorRT documents and NVIDIA Model-Optimizer writes, but for the scale per token. TensorRT
    insists that the quantizer's own second scale is a constant, which would have to be calibrated; it is 1 here, and
    the scale that NVFP4 wants above the blocks is computed at run time, per token rather than per tensor, so that no
    token's result depends on the others in the batch. TensorRT fuses the division into the operators before the
    quantizer and the multiplication into those behind the product.

    The quantizer is a model-local function of standard operators: onnx's checker and reference evaluator need
    nothing else. TensorRT's parser looks for built-in operators by name before it looks for functions, and so runs
    its own kernel. ONNX Runtime has no FLOAT4E2M1 kernels on the CPU and refuses the model on load.

    Run `FoldWeightTransposes` first if weights are stored as `[N,K]`. A MatMul that a glob names and that cannot be
    rewritten is refused with the reason.

    Args:
        layers: Globs over node names; nodes that match none stay as they are.
    """

    def __init__(self, layers: Sequence[str] = ("*",)) -> None:
        super().__init__()
        self.layers = tuple(layers)

    def requires(self, model: ir.Model) -> None:
        """Checks the opset.

        Raises:
            GraphError: It is older than the first with FLOAT4E2M1.
        """
        require_opset(model, MINIMUM_OPSET)

    def call(self, model: ir.Model) -> RewriteResult:
        """Rewrites every matching linear layer of the main graph."""
        refused: list[Refusal] = []
        matched = 0
        weights: dict[ir.Value, ir.Value] = {}
        activations: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in list(model.graph):
            if not self._names(node):
                continue
            reason = why_not_quantizable(node, BLOCK_SIZE) or _why_not_tensorrt(node)
            if reason is not None:
                refused.append(Refusal(str(node.name), reason))
                continue
            x, weight = input_of(node, 0), input_of(node, 1)
            if weight not in weights:
                weights[weight] = _static(node, weight)
            if x not in activations:
                _add_function(model)
                activations[x] = _dynamic(node, x)
            _multiply(node, *activations[x], weights[weight])
            if not weight.uses():
                model.graph.initializers.pop(str(weight.name))
            matched += 1
        return RewriteResult(model, modified=matched > 0, matched=matched, refused=refused)

    def _names(self, node: ir.Node) -> bool:
        if not is_linear(node):
            return False
        return any(fnmatch.fnmatchcase(node.name or "", glob) for glob in self.layers)


def _label(node: ir.Node) -> str:
    # Nodes need no name, values have one.
    return str(node.name or node.outputs[0].name)


def _why_not_tensorrt(node: ir.Node) -> str | None:
    x = input_of(node, 0)
    if x.shape is not None and len(x.shape) not in (2, 3):
        return f"its input has rank {len(x.shape)}; TensorRT quantizes rank 2 and 3 to FP4"
    return None


def _static(node: ir.Node, weight: ir.Value) -> ir.Value:
    """Adds the weight's parts and what turns them back into `[K,N]`."""
    parts = _weight_parts(weight)
    for part in parts.values():
        graph_of(node).register_initializer(part)
    channels, outputs = matrix_shape(weight)
    builder = NodeBuilder(f"{_label(node)}/weight")
    values = _dequantize(builder, parts["codes"], parts["block_scales"], parts["global_scale"])
    turned = builder.op("Transpose", "Transpose", [values], ir.DataType.FLOAT, (channels, outputs), {"perm": [1, 0]})
    graph_of(node).insert_before(node, builder.nodes)
    return turned


def _dynamic(node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Adds the run-time quantization of `x`; returns the normalized values and the scale of every token."""
    builder = NodeBuilder(str(x.name))
    channels, _ = matrix_shape(input_of(node, 1))
    tokens = tuple(x.shape or ())[:-1]
    shape, float32 = (*tokens, channels), ir.DataType.FLOAT
    scale = _token_scale(builder, x, (*tokens, 1))
    normalized = builder.op("Normalize", "Div", [x, scale], float32, shape)
    one = builder.constant("one", np.array(1, np.float32))
    codes = builder.op(
        OP_TYPE,
        OP_TYPE,
        [normalized, one],
        ir.DataType.FLOAT4E2M1,
        shape,
        {"axis": -1, "block_size": BLOCK_SIZE, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
        domain=DOMAIN,
        outputs=2,
    )
    block_scales = builder.nodes[-1].outputs[1]
    block_scales.dtype = ir.DataType.FLOAT8E4M3FN
    block_scales.shape = ir.Shape((*tokens, channels // BLOCK_SIZE))
    values = _dequantize(builder, codes, block_scales, one)
    graph_of(node).insert_before(node, builder.nodes)
    return values, scale


def _token_scale(builder: NodeBuilder, x: ir.Value, column: Sequence[Dim]) -> ir.Value:
    float32 = ir.DataType.FLOAT
    magnitude = builder.op("scale/Abs", "Abs", [x], float32, tuple(x.shape or ()))
    last = builder.ints("scale/last", [-1])
    amplitude = builder.op("scale/ReduceMax", "ReduceMax", [magnitude, last], float32, column)
    span = builder.constant("scale/range", np.array(RANGE, np.float32))
    quotient = builder.op("scale/Div", "Div", [amplitude, span], float32, column)
    smallest = builder.constant("scale/smallest", np.array(SMALLEST_SCALE, np.float32))
    return builder.op("scale/Max", "Max", [quotient, smallest], float32, column)


def _dequantize(builder: NodeBuilder, codes: ir.Value, block_scales: ir.Value, outer_scale: ir.Value) -> ir.Value:
    name, float32 = "DequantizeLinear", ir.DataType.FLOAT
    scales = builder.op("scales/" + name, name, [block_scales, outer_scale], float32, tuple(block_scales.shape or ()))
    blocked = {"axis": -1, "block_size": BLOCK_SIZE}
    return builder.op(name, name, [codes, scales], float32, tuple(codes.shape or ()), blocked)


def _multiply(node: ir.Node, values: ir.Value, scale: ir.Value, weight: ir.Value) -> None:
    """Makes the product read FP4, and its readers read the product times the tokens' scales."""
    node.replace_input_with(0, values)
    node.replace_input_with(1, weight)
    product = node.outputs[0]
    builder = NodeBuilder(_label(node))
    shape = (*tuple(values.shape or ())[:-1], matrix_shape(weight)[1])
    scaled = builder.op("Rescale", "Mul", [product, scale], ir.DataType.FLOAT, shape)
    product.replace_all_uses_with(scaled, replace_graph_outputs=True)
    # That moved the new reader with the others.
    builder.nodes[0].replace_input_with(0, product)
    # The layer's output keeps its name: the graph's outputs are known by theirs.
    scaled.name, product.name = product.name, f"{_label(node)}/normalized"
    graph_of(node).insert_after(node, builder.nodes)


def _weight_parts(weight: ir.Value) -> dict[str, ir.Value]:
    channels, outputs = matrix_shape(weight)

    def quantize() -> Nvfp4:
        return quantize_nvfp4_weight(by_output_channel(weight))

    result = ReadByAll(quantize, readers=3)
    codes, scales = (outputs, channels), (outputs, channels // BLOCK_SIZE)
    fp4, fp8, f32 = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT
    return {
        "codes": weight_part(weight, "codes", fp4, codes, lambda: result.read().codes),
        "block_scales": weight_part(weight, "block_scales", fp8, scales, lambda: result.read().block_scales),
        "global_scale": weight_part(weight, "global_scale", f32, (), lambda: result.read().global_scale),
    }


def _add_function(model: ir.Model) -> None:
    text = _BODY.replace("OPSET", str(model.graph.opset_imports[""]))
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    model.ir_version = max(model.ir_version or 0, MINIMUM_IR_VERSION)
