"""The function `qavp.SelectDiverse`: `qavp_export.numerics.diverse` in standard operators (opset 18 or newer)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import onnx_ir as ir

from qavp_export.numerics.diverse import (
    FLOOR,
    FULL,
    LARGEST_CODE,
    MARGIN,
    MOST_CHANNELS,
    TINY,
    UNIT,
    Diversity,
    padded_width,
    sketch_signs,
)
from qavp_export.passes.functions import parse_function

SELECT_DIVERSE = "SelectDiverse"

Form: TypeAlias = Literal["portable", "cpu"]

# Loops are nested: rows that are added one by one are copied with their block only.
_BLOCK = 8

# Products are symmetric. `cpu` computes them in so many bands of rows, from the diagonal on: of more bands the copies
# would cost what the products save.
_BANDS = 4

_SIMILARITY = """
  last = Constant <value_ints: ints = [-1]> ()
  first = Constant <value_ints: ints = [0]> ()
  second = Constant <value_ints: ints = [1]> ()
  third = Constant <value_ints: ints = [2]> ()
  more = Constant <value: tensor = bool {{1}}> ()
  levels = Constant <value_float: float = {levels}> ()
  tiny = Constant <value_float: float = {tiny}> ()
  unit = Constant <value_float: float = {unit}> ()
  least = Constant <value_float: float = 1.0> ()
  all_channels = Cast <to: int = 1> (image_features)
{sketch}
  largest = ReduceMax <keepdims: int = 1> (values, last)
  smallest = ReduceMin <keepdims: int = 1> (values, last)
  depth = Neg (smallest)
  peak = Max (largest, depth)
  share = Div (peak, levels)
  step = Max (share, tiny)
  ratio = Div (values, step)
  codes = Round (ratio)
  {products}
  own_row = Transpose <perm: ints = [0, 2, 1]> (own)
  square = Cast <to: int = 1> (own_row)
  positive = Max (square, least)
  norm = Sqrt (positive)
  scale = Div (unit, norm)
  empty = Less (square, least)
  each_image = Concat <axis: int = 0> (images, second, second)
"""

_SIZES = """
  images = Shape <start: int = 0, end: int = 1> (codes)
  tokens = Shape <start: int = 1, end: int = 2> (codes)
"""

_DIAGONAL = """
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  token_count = Squeeze (tokens, first)
  raster = Range (zero, token_count, one)
  raster_column = Unsqueeze (raster, second)
  diagonal_shape = Concat <axis: int = 0> (images, tokens, second)
  diagonal = Expand (raster_column, diagonal_shape)
  own = GatherElements <axis: int = 2> (gram, diagonal)
"""

_GRAM = """
  swapped = Transpose <perm: ints = [0, 2, 1]> (codes)
  gram = MatMul (codes, swapped)
"""

_INTEGERS = """
  signed = Cast <to: int = 3> (codes)
  middle = Constant <value_float: float = 128.0> ()
  shifted = Add (codes, middle)
  unsigned = Cast <to: int = 2> (shifted)
  swapped = Transpose <perm: ints = [0, 2, 1]> (signed)
  zero_point = Constant <value: tensor = uint8 {128}> ()
  band_count = Constant <value_ints: ints = [@bands]> ()
"""

# Band i: tokens from `edge_i` on, times all from there on.
_BAND = """
  number_@i = Constant <value_ints: ints = [@i]> ()
  next_@i = Constant <value_ints: ints = [@next]> ()
  part_@i = Mul (tokens, number_@i)
  next_part_@i = Mul (tokens, next_@i)
  edge_@i = Div (part_@i, band_count)
  next_edge_@i = Div (next_part_@i, band_count)
  left_@i = Slice (unsigned, edge_@i, next_edge_@i, second)
  right_@i = Slice (swapped, edge_@i, tokens, third)
  upper_@i = MatMulInteger (left_@i, right_@i, zero_point)
"""

# What band i has in common with band j above it.
_MIRROR = """
  begin_@i_@j = Sub (edge_@i, edge_@j)
  end_@i_@j = Sub (next_edge_@i, edge_@j)
  above_@i_@j = Slice (upper_@j, begin_@i_@j, end_@i_@j, third)
  mirrored_@i_@j = Transpose <perm: ints = [0, 2, 1]> (above_@i_@j)
"""

# No products: what a row of them is made of, for `dpp`, which needs few rows. ONNX Runtime multiplies one vector of
# unsigned integers without a zero point by a matrix in place; anything else it copies the matrix for.
_FACTORS = """
  signed = Cast <to: int = 3> (codes)
  swapped = Transpose <perm: ints = [0, 2, 1]> (signed)
  shift = Constant <value_float: float = {levels}> ()
  shifted = Add (codes, shift)
  unsigned = Cast <to: int = 2> (shifted)
  code_sum = ReduceSum <keepdims: int = 1> (codes, last)
  code_sum_row = Transpose <perm: ints = [0, 2, 1]> (code_sum)
  excess = Mul (code_sum_row, shift)
  code_square = Mul (codes, codes)
  own = ReduceSum <keepdims: int = 1> (code_square, last)
"""

_STORED_ROW = """
      products = GatherND <batch_dims: int = 1> (gram, picked)
      float_products = Cast <to: int = 1> (products)
"""

_NEW_ROW = """
      code = GatherND <batch_dims: int = 1> (unsigned, picked)
      raised = MatMulInteger (code, swapped)
      float_raised = Cast <to: int = 1> (raised)
      float_products = Sub (float_raised, excess)
"""

# Token j against all: `cosine [B,1,N]` in units of 2^-22, given `picked [B,1,1]`.
_COSINE = """
{row}
      own_scale = GatherElements <axis: int = 2> (scale, picked)
      scales = Mul (scale, own_scale)
      cosine = Mul (float_products, scales)
"""

# A column becomes a row by a Reshape: ONNX Runtime fuses a Transpose with the product, which then packs all rows.
_DPP = """
  margin = Constant <value_float: float = {margin}> ()
  epsilon = Constant <value_float: float = 1.0e-8> ()
  floor = Constant <value_float: float = {floor}> ()
  full = Constant <value_float: float = {full}> ()
  minus = Constant <value: tensor = float[1,1,1] {{-1.0}}> ()
  nothing = Constant <value: tensor = float[1,1,1] {{0.0}}> ()
  steps = Constant <value_int: int = {block}> ()
  steps_1d = Constant <value_ints: ints = [{block}]> ()
  round_up = Constant <value_ints: ints = [{block_less}]> ()
  far = Constant <value_ints: ints = [9223372036854775807]> ()
  low = ReduceMin <keepdims: int = 1> (score, second)
  high = ReduceMax <keepdims: int = 1> (score, second)
  range = Sub (high, low)
  span = Add (range, epsilon)
  above = Sub (score, low)
  scaled = Div (above, span)
  quality = Add (scaled, margin)
  quality_square = Mul (quality, quality)
  weight = Unsqueeze (quality_square, second)
  rest = Where (empty, floor, full)
  taken = Expand (minus, each_image)
  count_up = Add (count, round_up)
  block_count = Div (count_up, steps_1d)
  blocks = Squeeze (block_count, first)
  padded = Mul (block_count, steps_1d)
  block_shape = Concat <axis: int = 0> (images, steps_1d, tokens)
  empty_block = Expand (nothing, block_shape)
  rows_shape = Concat <axis: int = 0> (images, {capacity}, tokens)
  rows = Expand (nothing, rows_shape)
  block_row_shape = Concat <axis: int = 0> (images, second, steps_1d)
  weight_end, rest_end, rows_end, choices = Loop (blocks, more, weight, rest, rows) <body = blocks_body
    (int64 block, bool go, float[b,1,n] weight_0, float[b,1,n] rest_0, float[b,r,n] rows_0)
    => (bool go_on, float[b,1,n] weight_1, float[b,1,n] rest_1, float[b,s,n] rows_1, int64[c,b,1,1] picks)
  {{
    go_on = Identity (go)
    rows_before = Shape <start: int = 1, end: int = 2> (rows_0)
    column_shape = Concat <axis: int = 0> (images, rows_before, second)
    row_before_shape = Concat <axis: int = 0> (images, second, rows_before)
    weight_1, rest_1, written, picks = Loop (steps, more, weight_0, rest_0, empty_block) <body = steps_body
      (int64 index, bool going, float[b,1,n] weight_in, float[b,1,n] rest_in, float[b,t,n] rows_in)
      => (bool still, float[b,1,n] weight_out, float[b,1,n] rest_out, float[b,u,n] rows_out, int64[b,1,1] picked)
    {{
      still = Identity (going)
      gain = Mul (weight_in, rest_in)
      picked = ArgMax <axis: int = 2, keepdims: int = 1> (gain)
      weight_out = ScatterElements <axis: int = 2> (weight_in, picked, taken)
{cosine}
      place_before = Expand (picked, column_shape)
      column_before = GatherElements <axis: int = 2> (rows_0, place_before)
      factors_before = Reshape (column_before, row_before_shape)
      known_before = MatMul (factors_before, rows_0)
      block_column_shape = Concat <axis: int = 0> (images, steps_1d, second)
      place = Expand (picked, block_column_shape)
      column = GatherElements <axis: int = 2> (rows_in, place)
      factors = Reshape (column, block_row_shape)
      known_here = MatMul (factors, rows_in)
      known = Add (known_before, known_here)
      new = Sub (cosine, known)
      limit = Sqrt (rest_in)
      own_limit = GatherElements <axis: int = 2> (limit, picked)
      quotient = Div (new, own_limit)
      opposite = Neg (limit)
      above_least = Max (quotient, opposite)
      clipped = Min (above_least, limit)
      row = Round (clipped)
      row_square = Mul (row, row)
      less = Sub (rest_in, row_square)
      rest_out = Max (less, floor)
      newer = Slice (rows_in, second, far, second)
      rows_out = Concat <axis: int = 1> (newer, row)
    }}>
{append}
  }}>
  choice_shape = Concat <axis: int = 0> (last, images)
  by_step = Reshape (choices, choice_shape)
  by_image = Transpose <perm: ints = [1, 0]> (by_step)
  order = Slice (by_image, first, count, second)
"""

# The oldest rows are zeros: those of steps to come. In which order rows are added up does not matter.
_APPENDS = {
    "portable": """
    old = Slice (rows_0, steps_1d, far, second)
    rows_1 = Concat <axis: int = 1> (old, written)
""",
    "cpu": "    rows_1 = Concat <axis: int = 1> (rows_0, written)",
}

_MAXMIN = """
  grid = Constant <value_float: float = {grid}> ()
  most = Constant <value_float: float = {unit}> ()
  opposite = Constant <value_float: float = {opposite}> ()
  masked = Constant <value_float: float = {masked}> ()
  beyond = Constant <value: tensor = float[1,1,1] {{{beyond}}}> ()
  taken = Expand (beyond, each_image)
  itself = Equal (raster_column, raster)
  float_gram = Cast <to: int = 1> (gram)
  scaled_gram = Mul (float_gram, scale)
  others = Where (itself, masked, scaled_gram)
  closest = ReduceMax <keepdims: int = 0> (others, last)
  closest_row = Unsqueeze (closest, second)
  closest_cosine = Mul (closest_row, scale)
  closest_raw = Mul (closest_cosine, grid)
  closest_rounded = Round (closest_raw)
  lone = Where (empty, most, closest_rounded)
  start = ArgMin <axis: int = 2, keepdims: int = 1> (lone)
  nearest = Where (empty, most, opposite)
  times = Squeeze (count, first)
  nearest_end, next_end, choices = Loop (times, more, nearest, start) <body = steps_body
    (int64 index, bool going, float[b,1,n] nearest_in, int64[b,1,1] picked)
    => (bool still, float[b,1,n] nearest_out, int64[b,1,1] picked_next, int64[b,1,1] picked_now)
  {{
    still = Identity (going)
    picked_now = Identity (picked)
{cosine}
    raw = Mul (cosine, grid)
    rounded = Round (raw)
    nearer = Max (nearest_in, rounded)
    nearest_out = ScatterElements <axis: int = 2> (nearer, picked, taken)
    picked_next = ArgMin <axis: int = 2, keepdims: int = 1> (nearest_out)
  }}>
  choice_shape = Concat <axis: int = 0> (last, images)
  by_step = Reshape (choices, choice_shape)
  order = Transpose <perm: ints = [1, 0]> (by_step)
"""

_SORT = "  indices, places = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (order, count)"


def select_diverse(select: Diversity, width: int, opset: int, form: Form = "portable") -> ir.Function:
    """The function `qavp.SelectDiverse`.

    Inputs are `image_features [B,N,width]` of any floating type, `score [B,N]` FLOAT and `count [1]` INT64: k. Outputs
    are `indices [B,k]` INT64, ascending, and `order [B,k]`, the same in the order of choice.

    Args:
        select: `dpp` or `maxmin`.
        width: Channels per token, D.
        opset: The version of the standard operators that the model imports.
        form: `portable` keeps the shapes of what its loops carry, as TensorRT requires. `cpu` gives the same indices
            and is faster there: it multiplies 8-bit integers, for `dpp` only those of chosen tokens, and reads only the
            rows that were written.

    Returns:
        The function.
    """
    levels, cosine = float(LARGEST_CODE), _COSINE.format(row=_STORED_ROW)
    # Where TensorRT's plugins take over, sizes are read off the products: they come first.
    products = _GRAM + _SIZES + _DIAGONAL if form == "portable" else _SIZES + _integer_gram() + _DIAGONAL
    if form == "cpu" and select == "dpp":
        products, cosine = _SIZES + _FACTORS.format(levels=levels), _COSINE.format(row=_NEW_ROW)
    body = _SIMILARITY.format(sketch=_sketch(width), products=products, unit=UNIT, levels=levels, tiny=TINY)
    if select == "dpp":
        body += _DPP.format(
            margin=MARGIN,
            floor=FLOOR,
            full=FULL,
            block=_BLOCK,
            block_less=_BLOCK - 1,
            capacity="padded" if form == "portable" else "second",
            cosine=cosine,
            append=_APPENDS[form],
        )
    else:
        body += _MAXMIN.format(grid=1 / UNIT, unit=UNIT, opposite=-UNIT, masked=-FULL, beyond=2 * UNIT, cosine=cosine)
    signature = f"{SELECT_DIVERSE} (image_features, score, count) => (indices, order)"
    return parse_function(signature, body + _SORT, opset, f"select={select}, {width} channels")


def _sketch(width: int) -> str:
    """Lines that sketch `all_channels` into `values`."""
    if width <= MOST_CHANNELS:
        return "  values = Identity (all_channels)"
    signs = ", ".join(f"{sign:.0f}" for sign in sketch_signs(width))
    half, source = padded_width(width), "signed_channels"
    lines = [
        f"  signs = Constant <value: tensor = float[{width}] {{{signs}}}> ()",
        "  signed_channels = Mul (all_channels, signs)",
    ]
    if half > width:
        lines.append(f"  pads = Constant <value_ints: ints = [0, 0, 0, 0, 0, {half - width}]> ()")
        lines.append("  padded_channels = Pad (signed_channels, pads)")
        source = "padded_channels"
    while half > MOST_CHANNELS:
        half //= 2
        # A sum of two has no order; ONNX Runtime takes longer to split and add.
        lines.append(f"  halves_shape_{half} = Constant <value_ints: ints = [0, 0, 2, {half}]> ()")
        lines.append(f"  halves_{half} = Reshape ({source}, halves_shape_{half})")
        lines.append(f"  folded_{half} = ReduceSum <keepdims: int = 0> (halves_{half}, third)")
        source = f"folded_{half}"
    return "\n".join([*lines, f"  values = Identity ({source})"])


def _integer_gram() -> str:
    """Lines that multiply `codes` with themselves, in 8-bit integers, into `gram`."""
    lines, rows = [_INTEGERS.replace("@bands", str(_BANDS))], []
    for band in range(_BANDS):
        lines.append(_BAND.replace("@i", str(band)).replace("@next", str(band + 1)))
        lines += [_MIRROR.replace("@i", str(band)).replace("@j", str(above)) for above in range(band)]
        parts = [*(f"mirrored_{band}_{above}" for above in range(band)), f"upper_{band}"]
        lines.append(f"  whole_{band} = Concat <axis: int = 2> ({', '.join(parts)})")
        rows.append(f"whole_{band}")
    return "\n".join([*lines, f"  gram = Concat <axis: int = 1> ({', '.join(rows)})"])
