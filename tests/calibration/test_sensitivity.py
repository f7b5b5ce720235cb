"""Which layers lose most: against direct computation, and within the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qavp_export.calibration.sensitivity import Sensitivity, choose_raised, measure_sensitivity
from qavp_export.calibration.stops import find_stops
from qavp_export.calibration.walk import Walk
from qavp_export.numerics.clip import quantize_two_level_clipped
from qavp_export.numerics.one_level import quantize_one_level
from qavp_export.numerics.two_level import quantize_two_level
from qavp_export.passes import W4A4, W4A8, W4A16, RoundWeights
from tests.passes.decoders import hand_made

GROUP = 16
BODY = """
    [gate] g = MatMul (x, w_gate)
    [up] u = MatMul (x, w_up)
    a = Mul (g, u)
    [down] y = MatMul (a, w_down)
"""
SHAPES = {"w_gate": (32, 48), "w_up": (32, 48), "w_down": (48, 32)}


def test_the_error_equals_a_direct_computation(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    model = hand_made("float[B,S,32] x", "float[B,S,32] y", BODY, weights)
    prompts = [rng.standard_normal((1, length, 32)).astype(np.float32) for length in (7, 3)]
    # A token of zeros has no error to speak of, but is one of the tokens.
    prompts[1][0, 1] = 0
    schemes = {"gate": W4A4, "up": W4A8, "down": W4A16}
    steps: list[tuple[int, int]] = []
    walk = Walk(model, [{"x": prompt} for prompt in prompts], tmp_path)
    measured = measure_sensitivity(walk, model, schemes, GROUP, RoundWeights(), lambda *step: steps.append(step))
    assert [layer.node for layer in measured] == ["gate", "up", "down"]
    assert [layer.size for layer in measured] == [32 * 48] * 3
    assert steps == [(0, 3), (2, 3)]
    x = np.concatenate([prompt[0] for prompt in prompts]).astype(np.float64)
    gated = (x @ weights["w_gate"]) * (x @ weights["w_up"])
    single = x.astype(np.float32)
    inputs = {
        "gate": (x, quantize_two_level(single, GROUP).dequantize()),
        "up": (x, quantize_one_level(single, 32, 8).dequantize()),
        "down": (gated, gated),
    }
    for layer in measured:
        weight = weights[f"w_{layer.node}"]
        rounded = quantize_two_level_clipped(np.ascontiguousarray(weight.T), GROUP).dequantize().T.astype(np.float64)
        exact, lossy = inputs[layer.node][0] @ weight, inputs[layer.node][1] @ rounded
        sizes = (exact**2).sum(-1)
        ratios = ((exact - lossy) ** 2).sum(-1) / np.where(sizes > 0, sizes, 1)
        # Float32 products against float64: errors of a few percent are differences of numbers 1e-6 exact.
        assert layer.error == pytest.approx(ratios.mean(), rel=1e-3)


def test_layers_with_one_input_make_one_stop() -> None:
    weights = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    model = hand_made("float[B,S,32] x", "float[B,S,32] y", BODY, weights)
    stops = find_stops(model, {"gate", "up", "down", "absent"})
    assert [[node.name for node in stop.nodes] for stop in stops] == [["gate", "up"], ["down"]]
    assert [stop.value.name for stop in stops] == ["x", "a"]
    assert [stop.value.name for stop in find_stops(model, {"down"})] == ["a"]


LAYERS = [
    Sensitivity("a", 0.10, 100),
    Sensitivity("b", 0.40, 300),
    Sensitivity("c", 0.20, 100),
    Sensitivity("d", 0.40, 400),
    Sensitivity("e", 0.01, 100),
]


@pytest.mark.parametrize(
    ("budget", "raised"),
    [
        (0.0, []),
        (0.05, []),
        # Of 1,000 weights 100 may be raised: c loses most for its size.
        (0.1, ["c"]),
        (0.4, ["c", "b"]),
        # a and d lose the same for their sizes; a is first by its name.
        (0.5, ["c", "b", "a"]),
        # d does not fit any more, but e does.
        (0.7, ["c", "b", "a", "e"]),
        (1.0, ["c", "b", "a", "d", "e"]),
    ],
)
def test_the_worst_are_raised_first_within_the_budget(budget: float, raised: list[str]) -> None:
    chosen = choose_raised(LAYERS, budget)
    assert [layer.node for layer in chosen] == raised
    assert [layer.node for layer in choose_raised(LAYERS[::-1], budget)] == raised
    assert sum(layer.size for layer in chosen) <= budget * 1000
