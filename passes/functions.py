"""Model-local functions of the scoring step, made of standard operators (opset 18 or newer).

Their arithmetic is `qavp_export.numerics`, operator for operator, and yields the same bits. Sums fold the
second half of the channels onto the first, so a function is specific to the number of channels.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from qavp_export.errors import GraphError

DOMAIN = "qavp"
HYBRID_TOKEN_SCORE = "HybridTokenScore"
TOKEN_NORM = "TokenNorm"

# A largest magnitude is the larger of the largest value and the smallest's opposite: neither is written out, as
# magnitudes would be, and the outlier intensity has its extremes from the same two reductions.
_HYBRID = """
  eps = Constant <value_float: float = 1.0e-8> ()
  one = Constant <value_float: float = 1.0> ()
  seven = Constant <value_float: float = 7.0> ()
  weight = Constant <value_float: float = @alpha> ()
  outlier_weight = Constant <value_float: float = @outlier_weight> ()
  last = Constant <value_ints: ints = [-1]> ()
  tokens = Constant <value_ints: ints = [1]> ()
  unsized = Constant <value_ints: ints = [0, 0, -1]> ()
  width = Constant <value_int: int = {width}> ()
  size = Constant <value_int: int = @group_size> ()
  features = Cast <to: int = 1> (image_features)
{normalize}
  sizes = Reshape (size, last)
  grouped = Concat <axis: int = 0> (unsized, sizes)
  groups = Reshape (v, grouped)
  group_high = ReduceMax <keepdims: int = 1> (groups, last)
  group_low = ReduceMin <keepdims: int = 1> (groups, last)
  group_depth = Neg (group_low)
  peak = Max (group_high, group_depth)
  scale = Div (peak, seven)
  divisor = Add (scale, eps)
  ratio = Div (groups, divisor)
  codes = Round (ratio)
  simulated = Mul (codes, scale)
  difference = Sub (groups, simulated)
  widths = Reshape (width, last)
  lead = Constant <value_ints: ints = [0, 0]> ()
  flat = Concat <axis: int = 0> (lead, widths)
  residual = Reshape (difference, flat)
  residual_squared = Mul (residual, residual)
{sum_residual}
  squared_error = Squeeze (residual_sum, last)
  error = Sqrt (squared_error)
  of_groups = Constant <value_ints: ints = [2, 3]> ()
  highest = ReduceMax <keepdims: int = 0> (group_high, of_groups)
  lowest = ReduceMin <keepdims: int = 0> (group_low, of_groups)
  outlier = Sub (highest, lowest)
{minmax}
  error_weight = Sub (one, outlier_weight)
  error_part = Mul (error_scaled, error_weight)
  outlier_part = Mul (outlier_scaled, outlier_weight)
  sensitivity = Add (error_part, outlier_part)
  rest = Sub (one, weight)
  relevance_part = Mul (semantic_scaled, weight)
  sensitivity_part = Mul (sensitivity, rest)
  score = Add (relevance_part, sensitivity_part)
"""

_RMS = """
  features_squared = Mul (features, features)
{sum_features}
  count = Cast <to: int = 1> (width)
  mean_square = Div (features_sum, count)
  root = Sqrt (mean_square)
  rms = Add (root, eps)
  v = Div (features, rms)
"""

_MINMAX = """
  {x}_low = ReduceMin <keepdims: int = 1> ({x}, tokens)
  {x}_high = ReduceMax <keepdims: int = 1> ({x}, tokens)
  {x}_range = Sub ({x}_high, {x}_low)
  {x}_span = Add ({x}_range, eps)
  {x}_above = Sub ({x}, {x}_low)
  {x}_scaled = Div ({x}_above, {x}_span)
"""

_NORM = """
  last = Constant <value_ints: ints = [-1]> ()
  features = Cast <to: int = 1> (image_features)
  features_squared = Mul (features, features)
{sum_features}
  squared = Squeeze (features_sum, last)
  norm = Sqrt (squared)
"""


def hybrid_token_score(width: int, opset: int, score_input: str) -> ir.Function:
    """The function `qavp.HybridTokenScore`.

    Inputs are `image_features [B,N,width]` of any floating type and `semantic [B,N]` FLOAT, the output is
    `score [B,N]` FLOAT; the attributes `group_size` (int), `alpha` and `outlier_weight` (float) are read by the body.

    Args:
        width: Channels per token, D.
        opset: The version of the standard operators that the model imports.
        score_input: `raw` or `rms`.

    Returns:
        The function.
    """
    rms = _RMS.format(sum_features=_pairwise_sum("features", width))
    body = _HYBRID.format(
        width=width,
        normalize=rms if score_input == "rms" else "  v = Identity (features)",
        sum_residual=_pairwise_sum("residual", width),
        minmax="".join(_MINMAX.format(x=x) for x in ("error", "outlier", "semantic")),
    )
    signature = f"{HYBRID_TOKEN_SCORE} <group_size, alpha, outlier_weight> (image_features, semantic) => (score)"
    return parse_function(signature, body, opset, f"score_input={score_input}, {width} channels")


def token_norm(width: int, opset: int) -> ir.Function:
    """The function `qavp.TokenNorm`: `image_features [B,N,width]` of any floating type -> `norm [B,N]` FLOAT.

    Args:
        width: Channels per token, D.
        opset: The version of the standard operators that the model imports.

    Returns:
        The function.
    """
    body = _NORM.format(sum_features=_pairwise_sum("features", width))
    return parse_function(f"{TOKEN_NORM} (image_features) => (norm)", body, opset, f"{width} channels")


def add_function(model: ir.Model, function: ir.Function) -> None:
    """Add a function to a model, with its domain.

    Raises:
        GraphError: The model has another function of that name.
    """
    present = model.functions.setdefault(function.identifier(), function)
    if present.doc_string != function.doc_string:
        raise GraphError(
            f"the model already has a function {function.domain}.{function.name} ({present.doc_string}) and "
            f"this pass needs another ({function.doc_string}); score one value per model"
        )
    model.opset_imports.setdefault(DOMAIN, 1)
    # Functions entered the format with this version.
    model.ir_version = max(model.ir_version or 0, 8)


def _pairwise_sum(name: str, width: int) -> str:
    """Lines that sum `{name}_squared` over the last axis into `{name}_sum`, of size 1 there."""
    lines, source, step = [f"  {name}_pair_axis = Constant <value_ints: ints = [2]> ()"], f"{name}_squared", 0
    while width > 1:
        half, step = width // 2, step + 1
        first, second, odd = (f"{name}_{part}_{step}" for part in ("first", "second", "odd"))
        folded = f"{name}_fold_{step}"
        if width % 2:
            sizes = f"{name}_sizes_{step}"
            lines.append(f"  {sizes} = Constant <value_ints: ints = [{half}, {half}, 1]> ()")
            lines.append(f"  {first}, {second}, {odd} = Split <axis: int = -1> ({source}, {sizes})")
            lines.append(f"  {folded}_even = Add ({first}, {second})")
            lines.append(f"  {folded} = Concat <axis: int = -1> ({folded}_even, {odd})")
        else:
            # A sum of two has no order; the reduction reads both halves where they are, a Split copies them first.
            pairs = f"{name}_pairs_{step}"
            lines.append(f"  {pairs}_shape = Constant <value_ints: ints = [0, 0, 2, {half}]> ()")
            lines.append(f"  {pairs} = Reshape ({source}, {pairs}_shape)")
            lines.append(f"  {folded} = ReduceSum <keepdims: int = 0> ({pairs}, {name}_pair_axis)")
        source, width = folded, half + width % 2
    return "\n".join([*lines, f"  {name}_sum = Identity ({source})"])


def parse_function(signature: str, body: str, opset: int, doc_string: str) -> ir.Function:
    """A function of domain `qavp` from ONNX's text form.

    Args:
        signature: Its name, attributes, inputs and outputs.
        body: Its nodes.
        opset: The version of the standard operators.
        doc_string: What tells it from others of its name.

    Returns:
        The function.
    """
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{signature}\n{{\n{body}\n}}'
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    function.doc_string = doc_string
    return function
