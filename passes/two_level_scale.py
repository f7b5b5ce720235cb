"""The function `qavp.TwoLevelScale`: run-time group scales of two-level 4-bit activations."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

DOMAIN = "qavp"
OP_TYPE = "TwoLevelScale"

# numerics section 3; `divisor` keeps a vector of zeros from dividing by zero.
_BODY = """
<domain: "qavp", opset_import: ["" : OPSET]>
TwoLevelScale <group_size> (x) => (scale)
{
  last = Constant <value_ints: ints = [-1]> ()
  zero = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  seven = Constant <value_float: float = 7.0> ()
  fifteen = Constant <value_float: float = 15.0> ()
  size = Constant <value_int: int = @group_size> ()
  sizes = Reshape (size, last)
  leading = Shape <start: int = 0, end: int = -1> (x)
  grouped_shape = Concat <axis: int = 0> (leading, last, sizes)
  magnitude = Abs (x)
  grouped = Reshape (magnitude, grouped_shape)
  peak = ReduceMax <keepdims: int = 0> (grouped, last)
  amplitude = Div (peak, seven)
  loudest = ReduceMax <keepdims: int = 1> (amplitude, last)
  step = Div (loudest, fifteen)
  positive = Greater (step, zero)
  divisor = Where (positive, step, one)
  ratio = Div (amplitude, divisor)
  rounded = Ceil (ratio)
  multiplier = Clip (rounded, one, fifteen)
  scale = Mul (multiplier, divisor)
}
"""


def two_level_scale_function(opset: int) -> ir.Function:
    """Returns the function: `x [...,K]` f32 -> `scale [...,K/group_size]` f32, attribute `group_size`.

    Args:
        opset: The version of the standard operators that the model imports, 18 or newer.
    """
    return ir.serde.deserialize_function(onnx.parser.parse_function(_BODY.replace("OPSET", str(opset))))
