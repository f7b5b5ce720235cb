"""Lowered linear layers: the integers are the canonical graph's, what is rounded otherwise stays within its bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

from qavp_export.engines.lowering.split import remove_unused
from qavp_export.engines.ort.lowering.capabilities import CPU, CPU_UNSIGNED, CUDA, Capabilities
from qavp_export.engines.ort.lowering.linear import Products, lower_linears
from qavp_export.engines.ort.lowering.weights import Lowered, WeightPlans
from qavp_export.engines.ort.weights import read_weights
from qavp_export.errors import GraphError
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes import SCHEMES, W4A4, W4A8, W4A16, W8A8, PlaceQdq, RoundWeights, Scheme
from tests.engines.lowered import Array, nodes_of, open_canonical, open_lowered, run, write_canonical
from tests.passes.decoders import hand_made

# Input channels, output channels and group size.
SIZES = [(64, 5, 16), (96, 67, 32), (192, 1, 64), (256, 33, 128), (128, 6, 128)]
ONE_LEVEL = {
    f"{name}, one-level": Scheme(kind.weights, kind.activations, "one-level") for name, kind in SCHEMES.items()
}
ALL_SCHEMES = {**SCHEMES, **ONE_LEVEL}
PROVIDERS = {"cpu": CPU, "cpu without VNNI": CPU_UNSIGNED, "cuda": CUDA}
# Of sum |x||w|: float32 sums in another order, of at most 256 terms.
ROUNDING = 2e-6
Quantized = TwoLevel | OneLevel


@dataclass(frozen=True)
class _Layers:
    """Two linear layers that read `x`, one that reads `y`, quantized and written as a bundle has them."""

    bundle: Path
    model: ir.Model
    weights: Mapping[str, Array]
    group: int

    @classmethod
    def of(cls, bundle: Path, sizes: tuple[int, int, int], schemes: Mapping[str, Scheme]) -> _Layers:
        inputs, outputs, group = sizes
        rng = np.random.default_rng(inputs)
        shapes = {"w": (inputs, outputs), "v": (inputs, outputs + 2), "u": (inputs, 3)}
        weights = {
            name: (rng.standard_normal(shape) * rng.uniform(0.1, 4, shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        weights["v"][:, 0] = 0
        model = hand_made(
            f"float[B,S,{inputs}] x, float[B,S,{inputs}] y",
            f"float[B,S,{outputs}] a, float[B,S,{outputs + 2}] b, float[B,S,3] c",
            "[first] a = MatMul (x, w) [second] b = MatMul (x, v) [third] c = MatMul (y, u)",
            weights,
        )
        PlaceQdq(group, tuple(schemes.items()), RoundWeights(clip_search=False))(model)
        return cls(bundle, write_canonical(model, bundle), weights, group)

    def lower(self, products: Products, capabilities: Capabilities = CPU) -> Lowered:
        model, plans = self.model.clone(), WeightPlans("decoder")
        precision = lower_linears(model.graph, products, capabilities, plans)
        remove_unused(model)
        return Lowered(model, plans.finish(model.graph), precision)

    def canonical(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return run(open_canonical(self.bundle), feeds)


def _weight(weight: Array, scheme: Scheme, group: int) -> Quantized:
    """A weight `[N,K]` by the schemes' definition."""
    size = weight.shape[1]
    if scheme.weights == "int8":
        return quantize_one_level(weight, size if scheme.activations == "int8" else group, 8)
    return quantize_two_level(weight, group) if scheme.scales == "two-level" else quantize_one_level(weight, group, 4)


def _activation(x: Array, scheme: Scheme, group: int) -> Quantized | None:
    if scheme.activations is None:
        return None
    if scheme.activations == "int8":
        return quantize_one_level(x, x.shape[-1], 8)
    return quantize_two_level(x, group) if scheme.scales == "two-level" else quantize_one_level(x, group, 4)


def _integers(quantized: Quantized) -> Array:
    """Codes times multipliers, which 8 bits hold."""
    if isinstance(quantized, OneLevel):
        return quantized.codes
    group = quantized.codes.shape[-1] // quantized.multipliers.shape[-1]
    products = quantized.codes.astype(np.int32) * np.repeat(quantized.multipliers.astype(np.int32), group, axis=-1)
    assert np.abs(products).max() <= 127
    return products.astype(np.int8)


def _is_integer_product(scheme: Scheme, sizes: tuple[int, int, int]) -> bool:
    """Whether one float per token and one per output channel are left behind the integers."""
    if scheme.activations is None:
        return False
    one_group = sizes[0] == sizes[2]
    of_weight = (scheme.weights == "int4" and scheme.scales == "two-level") or scheme.weights == "int8" or one_group
    return of_weight and (scheme.activations == "int8" or scheme.scales == "two-level" or one_group)


def _inputs(channels: int, group: int, smallest: float = 1e-37) -> dict[str, Array]:
    """Tokens of zeros, with groups of zeros, huge and tiny ones, and ones in which a channel stands out.

    The scales of 1e-37 are below the smallest normal float.
    """
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((2, 5, channels)).astype(np.float32)
    x[0, 1] = 0
    x[0, 2] *= np.float32(1e30)
    x[0, 3] *= np.float32(1e-30)
    x[0, 4] *= np.float32(smallest)
    x[1, 0, : group // 2] = 0
    x[1, 1] *= 10.0 ** rng.integers(-6, 5, channels).astype(np.float32)
    x[1, 2, 7] = 65504
    x[1, 3] = 1
    y = -np.roll(x, 3, axis=1)[:, ::-1].copy()
    return {"x": x, "y": y}


def _tap(lowered: Lowered, value: ir.Value | None, name: str) -> None:
    """Makes a value an output."""
    assert value is not None
    if value not in lowered.model.graph.outputs:
        value.name = name
        lowered.model.graph.outputs.append(value)


INTEGER_CASES = [
    (name, sizes) for name, scheme in ALL_SCHEMES.items() for sizes in SIZES if _is_integer_product(scheme, sizes)
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("name", "sizes"), INTEGER_CASES)
def test_the_integers_are_the_reference_ones(
    tmp_path: Path, name: str, sizes: tuple[int, int, int], provider: str
) -> None:
    scheme, capabilities = ALL_SCHEMES[name], PROVIDERS[provider]
    layers = _Layers.of(tmp_path, sizes, dict.fromkeys(("first", "second", "third"), scheme))
    lowered = layers.lower("integer", capabilities)
    feeds = _inputs(sizes[0], sizes[2])
    products = nodes_of(lowered.model, "MatMulIntegerToFloat" if capabilities.fused_scales else "MatMulInteger")
    assert len(products) == 3
    # `first` and `second` read the same codes.
    assert products[0].inputs[0] is products[1].inputs[0]
    for number in (0, 2):
        _tap(lowered, products[number].inputs[0], f"codes{number}")
        if not capabilities.fused_scales:
            _tap(lowered, products[number].outputs[0], f"sum{number}")
    outputs = run(open_lowered(lowered, tmp_path, "lowered"), feeds)
    made = dict(read_weights(tmp_path, lowered.weights, threads=1))
    for number, read, weight in ((0, "x", "w"), (2, "y", "u")):
        expected = _integers(cast(Quantized, _activation(feeds[read], scheme, sizes[2]))).astype(np.int32)
        zero_point = 128 if capabilities.activations == ir.DataType.UINT8 else 0
        np.testing.assert_array_equal(outputs[f"codes{number}"].astype(np.int32) - zero_point, expected)
        of_weight = _integers(_weight(layers.weights[weight].T, scheme, sizes[2])).astype(np.int32).T
        zero_point = 128 if capabilities.weights == ir.DataType.UINT8 else 0
        stored = made[str(cast(ir.Value, products[number].inputs[1]).name)]
        assert stored.dtype == (np.uint8 if zero_point else np.int8)
        np.testing.assert_array_equal(stored.astype(np.int32) - zero_point, of_weight)
        if not capabilities.fused_scales:
            np.testing.assert_array_equal(outputs[f"sum{number}"], expected @ of_weight)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("name", "sizes"), INTEGER_CASES)
def test_integer_products_equal_the_canonical_graph(
    tmp_path: Path, name: str, sizes: tuple[int, int, int], provider: str
) -> None:
    scheme = ALL_SCHEMES[name]
    layers = _Layers.of(tmp_path, sizes, dict.fromkeys(("first", "second", "third"), scheme))
    lowered = layers.lower("integer", PROVIDERS[provider])
    feeds = _inputs(sizes[0], sizes[2])
    actual, canonical = run(open_lowered(lowered, tmp_path, "lowered"), feeds), layers.canonical(feeds)
    for output, read, weight in (("a", "x", "w"), ("b", "x", "v"), ("c", "y", "u")):
        of_input = cast(Quantized, _activation(feeds[read], scheme, sizes[2])).dequantize().astype(np.float64)
        of_weight = _weight(layers.weights[weight].T, scheme, sizes[2]).dequantize().astype(np.float64).T
        # The smallest float is what a token of 1e-30 may be off by.
        bound = np.abs(of_input) @ np.abs(of_weight) * ROUNDING + np.finfo(np.float32).tiny
        for found in (actual, canonical):
            assert (np.abs(found[output] - of_input @ of_weight) <= bound).all()
        assert not actual[output][~feeds[read].any(axis=-1)].any()
    assert actual["a"].shape == (2, 5, sizes[1])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["w4a4", "w4a8", "w8a8"])
def test_subnormal_activations_stay_as_small(tmp_path: Path, name: str, sizes: tuple[int, int, int]) -> None:
    # Scales round to 0, where the canonical graph takes 1 and answers 0. Codes differ there; the answer is as small.
    layers = _Layers.of(tmp_path, sizes, dict.fromkeys(("first", "second", "third"), SCHEMES[name]))
    x = (np.random.default_rng(0).standard_normal((3, 4, sizes[0])) * [[[1e-45]], [[1e-44]], [[1e-43]]]).astype(
        np.float32
    )
    outputs = run(open_lowered(layers.lower("integer"), tmp_path, "lowered"), {"x": x, "y": x})
    # A code is at most 127 times the smallest float.
    bound = 127 * np.finfo(np.float32).smallest_subnormal * np.abs(layers.weights["w"]).sum(axis=0)
    assert (np.abs(outputs["a"]) <= bound).all()


def _rounding_bound(x: Array, weight: Array, scheme: Scheme, group: int) -> Array:
    """How far MatMulNBits at accuracy level 4 may be from the canonical graph `[...,N]`.

    It rounds each block of x to 8 bits: at most half of its largest value / 127. The canonical graph rounds x too: at
    most half of the scale.

    Args:
        x: `[...,K]`.
        weight: The dequantized weight `[N,K]`.
        scheme: The canonical scheme.
        group: Channels of a block.
    """
    blocks = (*x.shape[:-1], x.shape[-1] // group, group)
    error = np.repeat(np.abs(x).reshape(blocks).max(axis=-1) / 254, group, axis=-1).astype(np.float64)
    quantized = _activation(x, scheme, group)
    if quantized is not None:
        scales = quantized.scales() if isinstance(quantized, TwoLevel) else quantized.scales
        # A group of zeros has a scale, and no error.
        used = np.repeat(scales, x.shape[-1] // scales.shape[-1], axis=-1) / 2
        error += np.where(x == 0, 0, used)
    return np.asarray(error @ np.abs(weight).T.astype(np.float64))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", [name for name in ALL_SCHEMES if not name.startswith("w8a8")])
def test_packed_products_stay_within_the_stated_bound(tmp_path: Path, name: str, sizes: tuple[int, int, int]) -> None:
    scheme = ALL_SCHEMES[name]
    layers = _Layers.of(tmp_path, sizes, dict.fromkeys(("first", "second", "third"), scheme))
    lowered = layers.lower("packed")
    nodes = nodes_of(lowered.model, "MatMulNBits")
    assert len(nodes) == 3
    assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {4}
    # MatMulNBits multiplies by 127 / largest, which below 4e-37 is infinite.
    feeds = _inputs(sizes[0], sizes[2], smallest=1e-30)
    actual, canonical = run(open_lowered(lowered, tmp_path, "lowered"), feeds), layers.canonical(feeds)
    for output, read, weight in (("a", "x", "w"), ("b", "x", "v"), ("c", "y", "u")):
        quantized = _weight(layers.weights[weight].T, scheme, sizes[2])
        bound = _rounding_bound(feeds[read], quantized.dequantize(), scheme, sizes[2])
        difference = np.abs(actual[output].astype(np.float64) - canonical[output])
        assert (difference <= bound + _float_rounding(feeds[read], quantized, scheme)).all()
        same_rounding = scheme.activations == "int8" and sizes[0] == sizes[2]
        if output == "b" and sizes[1] > 1 and not same_rounding:
            # Errors of K channels add up like sqrt(K), the bound like K: it is not far above what is seen.
            ordinary = feeds["x"][1, 4]
            assert difference[1, 4].max() > bound[1, 4].max() / 40
            # Half a code of 127, or of 7 with the canonical graph's: 1 to 8 % of the largest possible sum.
            largest = np.abs(ordinary).max() * np.abs(quantized.dequantize()).sum(axis=1)
            share = 1 / 254 + {"int4": 1 / 14, "int8": 1 / 254, None: 0}[scheme.activations]
            assert (bound[1, 4] <= 1.1 * share * largest).all()


def _float_rounding(x: Array, weight: Quantized, scheme: Scheme) -> Array:
    """Float32 sums in another order; MatMulNBits takes the zero point off what it has summed."""
    scales = weight.scales() if isinstance(weight, TwoLevel) else weight.scales
    zero_points = (8 if scheme.weights == "int4" else 128) * np.repeat(scales, x.shape[-1] // scales.shape[-1], axis=-1)
    terms = np.abs(weight.dequantize()).astype(np.float64) + zero_points
    return np.asarray(np.abs(x) @ terms.T * ROUNDING + np.finfo(np.float32).tiny)


def _expected_precision(scheme: Scheme, products: Products, sizes: tuple[int, int, int]) -> str:
    weight = scheme.weights[3:]
    if _is_integer_product(scheme, sizes) and (products == "integer" or scheme.weights == "int8"):
        return f"w{weight}a{cast(str, scheme.activations)[3:]}"
    # MatMulNBits rounds to 8 bits, whatever the scheme says.
    return f"w{weight}a8"


@pytest.mark.parametrize("products", ["integer", "packed"])
@pytest.mark.parametrize("sizes", [(96, 67, 32), (128, 6, 128)])
@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_the_report_is_what_runs(tmp_path: Path, name: str, sizes: tuple[int, int, int], products: Products) -> None:
    scheme = ALL_SCHEMES[name]
    lowered = _Layers.of(tmp_path, sizes, {"first": scheme, "third": scheme}).lower(products)
    expected = _expected_precision(scheme, products, sizes)
    assert lowered.precision == {"first": expected, "third": expected}
    operators = {"MatMulIntegerToFloat", "MatMulNBits"}
    ran = [node.op_type for node in lowered.model.graph if node.op_type in operators]
    integer = _is_integer_product(scheme, sizes) and (products == "integer" or scheme.weights == "int8")
    assert ran == ["MatMulIntegerToFloat" if integer else "MatMulNBits"] * 2
    # What is not quantized is left as it is.
    assert [node.name for node in nodes_of(lowered.model, "MatMul")] == ["second"]
    # No weight is made float again; codes of activations are, while they are multiplied.
    floats = [str(node.name) for node in nodes_of(lowered.model, "DequantizeLinear")]
    assert len(floats) == (2 if integer and scheme == W4A4 else 0)
    assert all("/products/" in name for name in floats)


@pytest.mark.parametrize(
    ("first", "second", "quantizers"),
    [(W4A4, W4A4, 1), (W4A4, W8A8, 2), (W4A8, W8A8, 1), (W4A8, W4A8, 1), (W4A4, W4A16, 1), (W4A16, W4A16, 0)],
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_layers_that_quantize_an_input_alike_share_it(
    tmp_path: Path, provider: str, first: Scheme, second: Scheme, quantizers: int
) -> None:
    layers = _Layers.of(tmp_path, (96, 67, 32), {"first": first, "second": second})
    lowered = layers.lower("integer", PROVIDERS[provider])
    # The CUDA provider refuses QuantizeLinear with blocks when it runs.
    rounding = nodes_of(lowered.model, "Round" if provider == "cuda" else "QuantizeLinear")
    assert sum(str(node.name).endswith("/codes") for node in rounding) == quantizers
    multiplied = provider != "cuda" and W4A4 in (first, second)
    assert len(rounding) == quantizers + multiplied
    assert sum(str(node.name).endswith("/scales/amplitude") for node in lowered.model.graph) == quantizers
    assert provider != "cuda" or not nodes_of(lowered.model, "QuantizeLinear")
    feeds = _inputs(96, 32)
    canonical, actual = layers.canonical(feeds), run(open_lowered(lowered, tmp_path, "lowered"), feeds)
    if W4A16 not in (first, second):
        for name in ("a", "b"):
            np.testing.assert_allclose(actual[name], canonical[name], rtol=0, atol=1e-5 * np.abs(canonical[name]).max())


def test_packed_weights_take_floats_and_leave_no_quantizer(tmp_path: Path) -> None:
    lowered = _Layers.of(tmp_path, (96, 67, 32), {"first": W4A4, "third": W4A8}).lower("packed")
    assert not [node.name for node in lowered.model.graph if "/scales/" in str(node.name)]
    assert [cast(Any, node.inputs[0]).name for node in nodes_of(lowered.model, "MatMulNBits")] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("w4a4, one-level", "w4a4"), ("w4a16", "w4a32"), ("w4a16, one-level", "w4a32"), ("w8a16", "w8a32")],
)
@pytest.mark.parametrize("products", ["integer", "packed"])
@pytest.mark.parametrize("sizes", [(96, 5, 8), (96, 5, 24), (1024, 5, 512)])
def test_groups_that_matmulnbits_does_not_take_stay_as_they_are(
    tmp_path: Path, sizes: tuple[int, int, int], products: Products, name: str, precision: str
) -> None:
    channels, _, group = sizes
    layers = _Layers.of(tmp_path, sizes, {"first": ALL_SCHEMES[name]})
    lowered = layers.lower(products)
    assert lowered.precision == {"first": precision}
    feeds = _inputs(channels, group)
    actual, canonical = run(open_lowered(lowered, tmp_path, "lowered"), feeds), layers.canonical(feeds)
    quantized = _activation(feeds["x"], ALL_SCHEMES[name], group)
    x = feeds["x"] if quantized is None else quantized.dequantize()
    bound = np.abs(x).astype(np.float64) @ np.abs(layers.weights["w"]) * ROUNDING + np.finfo(np.float32).tiny
    # A weight's code times its scale is at most a little more than the weight.
    assert (np.abs(actual["a"].astype(np.float64) - canonical["a"]) <= 1.2 * bound).all()


def test_weights_inside_the_graph_are_no_bundle(tmp_path: Path) -> None:
    layers = _Layers.of(tmp_path, (96, 67, 32), {"first": W4A4})
    inline = layers.model.clone()
    value = inline.graph.initializers["w.codes"]
    value.const_value = ir.tensor(np.zeros((96, 67), np.int8), dtype=ir.DataType.INT8, name="w.codes")
    with pytest.raises(GraphError, match=r"'w\.codes' does not lie in the bundle's weight files"):
        lower_linears(inline.graph, "integer", CPU, WeightPlans("decoder"))
