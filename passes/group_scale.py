"""The function `qavp.GroupScale`: run-time scales of activations, one float for each group of a token's channels."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

DOMAIN = "qavp"
OP_TYPE = "GroupScale"

# numerics/one_level.py, operator for operator.
_BODY = """
<domain: "qavp", opset_import: ["" : OPSET]>
GroupScale <group_size, largest_code> (x) => (scale)
{
  last = Constant <value_ints: ints = [-1]> ()
  zero = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  top = Constant <value_float: float = @largest_code> ()
  size = Constant <value_int: int = @group_size> ()
  sizes = Reshape (size, last)
  leading = Shape <start: int = 0, end: int = -1> (x)
  grouped_shape = Concat <axis: int = 0> (leading, last, sizes)
  magnitude = Abs (x)
  grouped = Reshape (magnitude, grouped_shape)
  peak = ReduceMax <keepdims: int = 0> (grouped, last)
  quotient = Div (peak, top)
  positive = Greater (quotient, zero)
  scale = Where (positive, quotient, one)
}
"""


def group_scale_function(opset: int) -> ir.Function:
    """Returns the function: `x [...,K]` f32 -> `scale [...,K/group_size]` f32.

    Its attributes are `group_size` (int) and `largest_code` (float): 7 for 4 bits, 127 for 8.

    Args:
        opset: The version of the standard operators that the model imports, 18 or newer.
    """
    return ir.serde.deserialize_function(onnx.parser.parse_function(_BODY.replace("OPSET", str(opset))))
