"""Model-local functions that TensorRT runs as plugins, made of standard operators that any runtime can run.

Each node of these functions carries `plugin_namespace`, `plugin_version` and `aot`: TensorRT's parser puts the plugin
of that name in its place where one is registered and inlines the function elsewhere. The bodies are the numerics' own
arithmetic: integers are the kernels' bit for bit, floats to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from qavp_export.errors import GraphError
from qavp_export.numerics.diverse import Diversity
from qavp_export.numerics.rotation import orthogonal
from qavp_export.passes._builder import Attribute
from qavp_export.passes.functions import DOMAIN, parse_function
from qavp_export.passes.hybrid_score import PLUGIN_NAMESPACE, PLUGIN_VERSION

TOKEN_SENSITIVITY = "TokenSensitivity"
MIX_TOKEN_SCORE = "MixTokenScore"
QUANTIZE_TWO_LEVEL = "QuantizeTwoLevel"
W4A4_MATMUL = "W4A4MatMul"
TOKEN_CODES = "TokenCodes"
TOKEN_PRODUCTS = "TokenProducts"
SELECT_DPP = "SelectDpp"
SELECT_MAXMIN = "SelectMaxmin"

PLUGIN_ATTRIBUTES: Mapping[str, Attribute] = MappingProxyType(
    {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION, "aot": 1}
)

# What both functions of the score read of the function that they are parts of.
_PARTS = ("error", "outlier")
_MATRIX = "matrix"
# What the functions of selection read of the function that they are parts of.
_CODES, _GRAM = "codes", "gram"

# numerics section 3. The matrix stands for that of numerics section 4's R4, which is put in its place.
_QUANTIZE = """
  last = Constant <value_ints: ints = [-1]> ()
  zero = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  lowest = Constant <value_float: float = -8.0> ()
  seven = Constant <value_float: float = 7.0> ()
  fifteen = Constant <value_float: float = 15.0> ()
  size = Constant <value_int: int = @group_size> ()
  rotated = Constant <value_int: int = @rotate> ()
  matrix = Constant <value_float: float = 1.0> ()
  sizes = Reshape (size, last)
  shape = Shape (x)
  leading = Shape <start: int = 0, end: int = -1> (x)
  grid = Concat <axis: int = 0> (leading, last, sizes)
  values = Cast <to: int = 1> (x)
  groups_before = Reshape (values, grid)
  groups_behind = MatMul (groups_before, matrix)
  rotates = Cast <to: int = 9> (rotated)
  groups = Where (rotates, groups_behind, groups_before)
  magnitude = Abs (groups)
  peak = ReduceMax <keepdims: int = 0> (magnitude, last)
  amplitude = Div (peak, seven)
  loudest = ReduceMax <keepdims: int = 1> (amplitude, last)
  steps = Div (loudest, fifteen)
  positive = Greater (steps, zero)
  divisor = Where (positive, steps, one)
  ratio = Div (amplitude, divisor)
  raised = Ceil (ratio)
  multiplier = Clip (raised, one, fifteen)
  scale = Mul (multiplier, divisor)
  scale_column = Unsqueeze (scale, last)
  multiplier_column = Unsqueeze (multiplier, last)
  code_ratio = Div (groups, scale_column)
  rounded = Round (code_ratio)
  codes = Clip (rounded, lowest, seven)
  float_products = Mul (codes, multiplier_column)
  flat = Reshape (float_products, shape)
  products = Cast <to: int = 3> (flat)
"""

# A byte holds two codes, each as code + 8 (`engines.kernels.packing`). Sums of integers are exact in float64, and
# TensorRT's parser refuses MatMulInteger.
_MATMUL = """
  last = Constant <value_ints: ints = [-1]> ()
  two = Constant <value_int: int = 2> ()
  zero = Constant <value_float: float = 0.0> ()
  eight = Constant <value_float: float = 8.0> ()
  sixteen = Constant <value_float: float = 16.0> ()
  byte = Constant <value_float: float = 256.0> ()
  size = Constant <value_int: int = @group_size> ()
  half = Div (size, two)
  halves = Reshape (half, last)
  channels = Shape <start: int = 0, end: int = 1> (weight)
  split = Concat <axis: int = 0> (channels, last, halves)
  flat = Concat <axis: int = 0> (channels, last)
  signed_bytes = Cast <to: int = 1> (weight)
  grouped = Reshape (signed_bytes, split)
  wrapped = Add (grouped, byte)
  is_negative = Less (grouped, zero)
  bytes = Where (is_negative, wrapped, grouped)
  sixteenth = Div (bytes, sixteen)
  high = Floor (sixteenth)
  high_part = Mul (high, sixteen)
  low = Sub (bytes, high_part)
  stored = Concat <axis: int = -1> (low, high)
  codes = Sub (stored, eight)
  factors = Cast <to: int = 1> (multipliers)
  factor_column = Unsqueeze (factors, last)
  float_weight = Mul (codes, factor_column)
  rows = Reshape (float_weight, flat)
  columns = Transpose <perm: ints = [1, 0]> (rows)
  exact_columns = Cast <to: int = 11> (columns)
  exact_products = Cast <to: int = 11> (products)
  sums = MatMul (exact_products, exact_columns)
  float_sums = Cast <to: int = 1> (sums)
  scales = Mul (steps, scale)
  y = Mul (float_sums, scales)
"""

_PRODUCTS = """
  values = Cast <to: int = 1> (codes)
  swapped = Transpose <perm: ints = [0, 2, 1]> (values)
  products = MatMul (values, swapped)
"""

# In front of what chooses: how many. The kernels' scratch memory is an output that nobody reads.
_COUNT = """
  kept_number = Constant <value_int: int = @kept> ()
  kept_shape = Constant <value_ints: ints = [-1]> ()
  {count} = Reshape (kept_number, kept_shape)
  scratch = Constant <value: tensor = float[1,1,1] {{0}}> ()
"""


def quantize_two_level_function(opset: int, group_size: int) -> ir.Function:
    """The function `qavp.QuantizeTwoLevel`: two-level 4-bit activations as what integer products take.

    `x [...,K]` of any floating type -> `products [...,K]` INT8 (codes times multipliers) and `steps [...,1]` FLOAT. The
    attribute `group_size` (int) is the channels of a group; with `rotate` (int) 1 every group of x is multiplied by an
    orthogonal Hadamard matrix first. A token of zeros has step 0.

    Args:
        opset: The version of the standard operators that the model imports, 18 or newer.
        group_size: Channels of a group: the matrix is part of the body.
    """
    signature = f"{QUANTIZE_TWO_LEVEL} <group_size, rotate> (x) => (products, steps)"
    function = parse_function(signature, _QUANTIZE, opset, f"groups of {group_size}")
    (constant,) = [node for node in function if node.outputs[0].name == _MATRIX]
    constant.attributes.clear()
    constant.attributes.add(ir.AttrTensor("value", ir.tensor(orthogonal(group_size).astype(np.float32))))
    return function


def w4a4_matmul_function(opset: int) -> ir.Function:
    """The function `qavp.W4A4MatMul`: a product of 8-bit integers, scaled per token and per output channel.

    Inputs are `products [...,K]` INT8, `steps [...,1]` FLOAT, `weight [N,K/2]` INT8 (two 4-bit codes a byte, see
    `engines.kernels.packing`), `multipliers [N,K/group_size]` INT8 and `scale [N]` FLOAT; the output is `y [...,N]`
    FLOAT.

    Args:
        opset: The version of the standard operators that the model imports, 18 or newer.
    """
    signature = f"{W4A4_MATMUL} <group_size> (products, steps, weight, multipliers, scale) => (y)"
    return parse_function(signature, _MATMUL, opset, "weights packed by halves of a group")


def split_hybrid_score(function: ir.Function) -> tuple[ir.Function, ir.Function]:
    """Cuts `qavp.HybridTokenScore` in two: what is computed of each token alone, and what is compared across tokens.

    Args:
        function: The canonical function.

    Returns:
        `TokenSensitivity (image_features) => (error, outlier)` with the attribute `group_size`, and
        `MixTokenScore (error, outlier, semantic) => (score)` with the attributes `alpha` and `outlier_weight`.

    Raises:
        GraphError: The function's body has no values of these names.
    """
    features, semantic = (str(value.name) for value in function.inputs)
    score = str(function.outputs[0].name)
    sensitivity = _part(function, TOKEN_SENSITIVITY, [features], _PARTS)
    mix = _part(function, MIX_TOKEN_SCORE, [*_PARTS, semantic], [score])
    return sensitivity, mix


def split_select_diverse(function: ir.Function, select: Diversity) -> tuple[ir.Function, ir.Function, ir.Function]:
    """Cuts `qavp.SelectDiverse` in three: what is computed of each token, of each pair, and of each image.

    Args:
        function: The canonical function.
        select: The rule that it follows.

    Returns:
        `TokenCodes (image_features) => (codes)` INT8, `TokenProducts (codes) => (products)` FLOAT, and, with the
        attribute `kept`, `SelectDpp (products, score) => (indices, order, scratch)` or
        `SelectMaxmin (products) => (indices, order)`: INT32, and a scratch output that is of no use.

    Raises:
        GraphError: The function's body has no values of these names.
    """
    features, score, count = (str(value.name) for value in function.inputs)
    codes = _part(function, TOKEN_CODES, [features], [_CODES])
    _cast_outputs(codes, ir.DataType.INT8)
    opset, form = function.opset_imports[""], function.doc_string or ""
    products = parse_function(f"{TOKEN_PRODUCTS} (codes) => (products)", _PRODUCTS, opset, "integers")
    name, inputs = (SELECT_DPP, [_GRAM, score]) if select == "dpp" else (SELECT_MAXMIN, [_GRAM])
    outputs = [str(value.name) for value in function.outputs]
    choice = _part(_sized_by_products(function), name, [*inputs, count], outputs)
    _cast_outputs(choice, ir.DataType.INT32)
    given = choice.inputs.pop()
    head = parse_function(f"{name} <kept> () => ({count}, scratch)", _COUNT.format(count=count), opset, form)
    nodes, (value, scratch) = list(head), head.outputs
    head.graph.outputs.clear()
    head.graph.remove(nodes)
    ir.convenience.replace_all_uses_with(given, value)
    choice.graph.insert_before(next(iter(choice)), nodes)
    choice.attributes.update(head.attributes)
    if select == "dpp":
        choice.outputs.append(scratch)
    return codes, products, choice


def _sized_by_products(function: ir.Function) -> ir.Function:
    """Returns a function that reads the numbers of images and tokens off the products, not the codes."""
    whole = function.clone()
    made = {value.name: value for node in whole for value in node.outputs}
    for node in whole:
        if node.op_type == "Shape" and node.inputs[0] is made.get(_CODES) and _GRAM in made:
            node.replace_input_with(0, made[_GRAM])
    return whole


def _cast_outputs(function: ir.Function, dtype: ir.DataType) -> None:
    """Gives all outputs of a function a type."""
    for index, value in enumerate(function.outputs):
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_cast")
        cast.outputs[0].name = f"{value.name}_{dtype.name.lower()}"
        function.graph.append(cast)
        function.graph.outputs[index] = cast.outputs[0]


def _part(function: ir.Function, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Function:
    """Returns the nodes of a function that lead from some of its values to others."""
    whole = function.clone()
    values = {value.name: value for value in (*whole.inputs, *(out for node in whole for out in node.outputs))}
    missing = [key for key in (*inputs, *outputs) if key not in values]
    if missing:
        raise GraphError(f"function {function.name} has no value {missing[0]!r}: the bundle is of another version")
    starts = []
    for value_name in inputs:
        start = values[value_name]
        if start.producer() is not None:
            start = ir.Value(name=value_name)
            ir.convenience.replace_all_uses_with(values[value_name], start)
        starts.append(start)
    ends = [values[value_name] for value_name in outputs]
    needed = _upstream(ends)
    graph = whole.graph
    graph.outputs.clear()
    graph.remove([node for node in whole if node not in needed])
    graph.inputs.clear()
    graph.inputs.extend(starts)
    graph.outputs.extend(ends)
    read = {attribute.ref_attr_name for node in graph for attribute in node.attributes.values()}
    attributes = [attribute for key, attribute in whole.attributes.items() if key in read]
    part = ir.Function(DOMAIN, name, graph=graph, attributes=attributes)
    part.doc_string = function.doc_string
    return part


def _upstream(values: Sequence[ir.Value]) -> set[ir.Node]:
    """Returns the nodes that values are computed by; bodies of loops read values from outside."""
    seen: set[ir.Node] = set()
    pending = [value.producer() for value in values]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(node.predecessors())
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                pending.extend(value.producer() for value in attribute.as_graph().outputs)
    return seen
