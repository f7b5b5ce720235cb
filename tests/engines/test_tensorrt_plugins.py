"""The TensorRT plugins against the real Python bindings of TensorRT 10.13 and 11, with no library and no GPU.

`plugin_probe` compiles three libraries whose functions return null, so that `tensorrt_bindings` can be imported (in a
process of its own). Registration is lazy there: it checks signatures and does not touch TensorRT's registry, which is
null. The bindings' own plugin class is then asked what TensorRT asks when it builds an engine: output types and shapes,
type combinations, tactics, the kernel and its launch. What is not covered is what only the libraries do: finding the
plugin while parsing ONNX, timing tactics, embedding the PTX and launching it.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qavp_export.engines.kernels.matmul import w4a4_matmul_grid, w4a4_matmul_spec
from qavp_export.engines.kernels.quantize import quantize_two_level_grid, quantize_two_level_spec
from qavp_export.engines.kernels.score import (
    BLOCK_PER_TOKEN,
    WARP_PER_TOKEN,
    default_tiling,
    mix_token_score_grid,
    mix_token_score_spec,
    token_sensitivity_grid,
    token_sensitivity_spec,
)
from qavp_export.engines.kernels.select import select_dpp_spec, select_grid, select_maxmin_spec
from qavp_export.engines.kernels.similarity import (
    token_codes_grid,
    token_codes_spec,
    token_products_grid,
    token_products_spec,
)
from qavp_export.engines.kernels.tilings import GemvTiling, matmul_tiling
from qavp_export.engines.tensorrt.plugins import register_plugins
from qavp_export.engines.tensorrt.plugins.linear import SHARED_BYTES, W4A4MatMul
from qavp_export.engines.tensorrt.plugins.plugin import Compiler, Tensor
from qavp_export.errors import InputError, UnavailableError
from tests.engines.plugin_probe import CAPABILITY, Case, Report, probe, stub_libraries

ROOT = Path(__file__).parents[2]
# The second is what `make` installs for these tests alone; its NumPy is older, see `register_plugins`.
BINDINGS = {11: None, 10: ROOT / "build" / "tensorrt-10"}

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="TensorRT is for Linux x86_64 here"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the stub libraries need a C compiler"),
]


def _matmul(tokens: Sequence[int], opt: Sequence[int], most: Sequence[int]) -> Case:
    inputs = [["INT8", [-1, -2, 192]], ["FLOAT", [-1, -2, 1]], ["INT8", [70, 96]], ["INT8", [70, 6]], ["FLOAT", [70]]]
    return {
        "name": "W4A4MatMul",
        "inputs": inputs,
        "attributes": {"group_size": 32},
        "opt": opt,
        "most": most,
        "tokens": tokens,
    }


def _quantize(dtype: str, rotate: int) -> Case:
    attributes = {"group_size": 32, "rotate": rotate}
    sizes = {"opt": [1, 64], "most": [2, 128], "tokens": [2, 9]}
    return {"name": "QuantizeTwoLevel", "inputs": [[dtype, [-1, -2, 192]]], "attributes": attributes, **sizes}


def _sensitivity(dtype: str, rms: int) -> Case:
    attributes = {"group_size": 32, "rms": rms}
    sizes = {"opt": [4], "most": [64], "tokens": [3]}
    return {"name": "TokenSensitivity", "inputs": [[dtype, [-1, 25, 96]]], "attributes": attributes, **sizes}


def _mix(tokens: int) -> Case:
    sizes = {"opt": [4], "most": [64], "tokens": [3]}
    attributes = {"alpha": 0.3, "outlier_weight": 0.7}
    return {"name": "MixTokenScore", "inputs": [["FLOAT", [-1, tokens]]] * 3, "attributes": attributes, **sizes}


def _selection(name: str, inputs: list[list[object]], **attributes: int) -> Case:
    sizes = {"opt": [4], "most": [64], "tokens": [3]}
    return {"name": name, "inputs": inputs, "attributes": attributes, **sizes}


_PRODUCTS, _SCORE = ["FLOAT", [-1, 25, 25]], ["FLOAT", [-1, 25]]

CASES: dict[str, Case] = {
    "sensitivity": _sensitivity("HALF", 0),
    "sensitivity in float32": _sensitivity("FLOAT", 0),
    "sensitivity of normalized tokens": _sensitivity("BF16", 1),
    "mix": _mix(25),
    "mix of a static size": _mix(32),
    "codes": _selection("TokenCodes", [["HALF", [-1, 25, 96]]]),
    "codes of a sketch": _selection("TokenCodes", [["FLOAT", [-1, 25, 4096]]]),
    "products": _selection("TokenProducts", [["INT8", [-1, 25, 96]]]),
    "dpp": _selection("SelectDpp", [_PRODUCTS, _SCORE], kept=9),
    "maxmin": _selection("SelectMaxmin", [_PRODUCTS], kept=9),
    "quantize": _quantize("FLOAT", 0),
    "rotate and quantize": _quantize("HALF", 1),
    "decode": _matmul([1, 1], [1, 1], [1, 1]),
    "prefill": _matmul([2, 300], [1, 64], [2, 1024]),
}


@pytest.fixture(scope="module", params=BINDINGS, ids=lambda major: f"TensorRT {major}")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What the plugins answered, by case."""
    folder = BINDINGS[request.param]
    if folder is None:
        spec = importlib.util.find_spec("tensorrt_bindings")
        folder = None if spec is None or spec.origin is None else Path(spec.origin).parents[1]
    if folder is None or not (folder / "tensorrt_bindings").is_dir():
        pytest.skip(f"the bindings of TensorRT {request.param} are not installed: make build/tensorrt-10")
    libraries = tmp_path_factory.mktemp("stubs")
    stub_libraries(libraries, request.param)
    return dict(zip(CASES, probe(folder, libraries, list(CASES.values())), strict=True))


OUTPUTS = {
    "TokenSensitivity": (["FLOAT", "FLOAT"], [[3, 25], [3, 25]]),
    "QuantizeTwoLevel": (["INT8", "FLOAT"], [[2, 9, 192], [2, 9, 1]]),
    "TokenProducts": (["FLOAT"], [[3, 25, 25]]),
    "SelectDpp": (["INT32", "INT32", "FLOAT"], [[3, 9], [3, 9], [3, 16, 28]]),
    "SelectMaxmin": (["INT32", "INT32"], [[3, 9], [3, 9]]),
}


def test_outputs_have_the_functions_types_and_shapes(reports: dict[str, Report]) -> None:
    for name, case in CASES.items():
        report = reports[name]
        if case["name"] == "TokenCodes":
            assert (report["types"], report["shapes"]) == (
                ["INT8"],
                [[3, 25, {96: 96, 4096: 1024}[case["inputs"][0][1][2]]]],
            )
        elif case["name"] in OUTPUTS:
            assert (report["types"], report["shapes"]) == OUTPUTS[case["name"]]
        elif case["name"] == "W4A4MatMul":
            assert (report["types"], report["shapes"]) == (["FLOAT"], [[*case["tokens"], 70]])
        else:
            assert (report["types"], report["shapes"]) == (["FLOAT"], [[3, case["inputs"][0][1][1]]])
        # Strongly typed: the types that are there and no other.
        assert report["combinations"] == [*(kind for kind, _ in case["inputs"]), *report["types"]]


def test_kernels_take_inputs_then_scalars_then_outputs(reports: dict[str, Report]) -> None:
    # TensorRT passes them in this order and checks nothing.
    for name, case in CASES.items():
        assert reports[name]["launches"]
        for launch in reports[name]["launches"]:
            assert launch["is_entry"]
            assert launch["target"] == f"sm_{CAPABILITY}"
            pointers, scalars = ["u64"] * len(case["inputs"]), ["u32"] * len(launch["scalars"])
            assert launch["arguments"] == [*pointers, *scalars, *["u64"] * len(reports[name]["types"])]
            assert launch["shared"] <= SHARED_BYTES


NAMES = {
    "sensitivity": (token_sensitivity_spec("fp16", 96, 32), ["features", "rows", "error", "outlier"]),
    "mix": (mix_token_score_spec(None, 0.5), ["error", "outlier", "semantic", "tokens", "score"]),
    "codes": (token_codes_spec("fp16", 96), ["features", "codes"]),
    "products": (token_products_spec(25, 96), ["codes", "products"]),
    "dpp": (select_dpp_spec(25, 9), ["products", "score", "indices", "order", "rows"]),
    "maxmin": (select_maxmin_spec(25, 9), ["products", "indices", "order"]),
    "quantize": (quantize_two_level_spec("fp32", 96, 32), ["x", "products", "steps"]),
    "matmul": (
        w4a4_matmul_spec(96, 70, 32, GemvTiling(2, 64, 4), "fp32"),
        ["products", "steps", "weight", "multipliers", "scales", "tokens", "output"],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_arguments_are_the_functions_inputs_and_outputs(name: str) -> None:
    spec, expected = NAMES[name]
    assert list(spec.signature) == expected


def test_launches_are_the_kernels_grids_and_scalars(reports: dict[str, Report]) -> None:
    few, many = (default_tiling(rows, 96, "raw") for rows in (1, 1 << 16))
    assert (few, many) == (BLOCK_PER_TOKEN, WARP_PER_TOKEN)
    assert [launch["grid"] for launch in reports["sensitivity"]["launches"]] == [
        list(token_sensitivity_grid(75, tiling)) for tiling in (few, many)
    ]
    assert [launch["block"] for launch in reports["sensitivity"]["launches"]] == [
        [32 * tiling.num_warps, 1, 1] for tiling in (few, many)
    ]
    for name, scalars in (("sensitivity", [75]), ("mix", [25]), ("mix of a static size", [32]), ("quantize", [])):
        assert all(launch["scalars"] == scalars for launch in reports[name]["launches"])
    grids = {
        "mix": mix_token_score_grid(3),
        "codes": token_codes_grid(75),
        "products": token_products_grid(3, 25),
        "dpp": select_grid(3),
        "maxmin": select_grid(3),
        "quantize": quantize_two_level_grid(18),
    }
    for name, grid in grids.items():
        assert [launch["grid"] for launch in reports[name]["launches"]] == [list(grid)]


def test_products_are_cut_for_the_profile(reports: dict[str, Report]) -> None:
    (decode,) = reports["decode"]["launches"]
    assert decode["kernel"] == "w4a4_gemv"
    assert decode["scalars"] == [1]
    assert decode["grid"] == list(w4a4_matmul_grid(1, 70, matmul_tiling(1, 192, 70, CAPABILITY, one_launch=True)))
    usual, largest = reports["prefill"]["launches"]
    for launch, tokens in ((usual, 64), (largest, 2048)):
        assert launch["tactic"] == tokens
        tiling = matmul_tiling(tokens, 192, 70, CAPABILITY, one_launch=True)
        assert launch["kernel"] == "w4a4_matmul"
        assert launch["grid"] == list(w4a4_matmul_grid(600, 70, tiling))
        assert launch["block"] == [32 * tiling.num_warps, 1, 1]
        assert launch["scalars"] == [600]


def _tensors(channels: int) -> list[Tensor]:
    shapes = [(2048, channels), (2048, 1), (256, channels // 2), (256, channels // 128), (256,)]
    return [Tensor("i8", shape, shape, shape, shape) for shape in shapes]


@pytest.mark.parametrize("capability", [80, 90])
def test_no_kernel_asks_for_more_shared_memory_than_every_launch_has(capability: int) -> None:
    compiler = Compiler(capability)
    launch = W4A4MatMul().launch(_tensors(512), {"group_size": 128}, 2048, compiler, lambda a, b: -(-a // b))
    assert launch.kernel.shared_bytes <= SHARED_BYTES
    tiling = matmul_tiling(2048, 512, 256, capability, one_launch=True)
    assert not isinstance(tiling, GemvTiling)
    deepest = compiler(w4a4_matmul_spec(512, 256, 128, tiling, "fp32"))
    more = compiler(w4a4_matmul_spec(512, 256, 128, replace(tiling, num_stages=tiling.num_stages + 1), "fp32"))
    # The tiling is as deep as it may be: otherwise there would be nothing to see here.
    assert max(deepest.shared_bytes, more.shared_bytes) > SHARED_BYTES
    assert compiler(w4a4_matmul_spec(512, 256, 128, tiling, "fp32")) is deepest


def test_a_size_that_kernels_need_must_be_fixed() -> None:
    with pytest.raises(InputError, match=r"axis -1 of a plugin's input of shape \[2, -1\] must have a fixed size"):
        Tensor("fp32", (2, -1), (2, 8), (2, 8), (2, 8)).size(-1)


def _module(name: str, version: str) -> ModuleType:
    module = ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]
    return module


def test_a_tensorrt_without_plugins_is_refused() -> None:
    with pytest.raises(UnavailableError, match=r"^tensorrt_rtx 1\.7\.1 has no plugins .*; TensorRT 10\.13 has$"):
        register_plugins(_module("tensorrt_rtx", "1.7.1"), 80)


@pytest.mark.skipif(tuple(map(int, np.__version__.split(".")[:2])) < (2, 4), reason="NumPy 2.3 takes it")
@pytest.mark.parametrize("version", ["10.13.3.9", "10.16.1.11", "11.1.0.106"])
def test_a_numpy_that_the_bindings_cannot_use_is_refused(version: str) -> None:
    module = _module("tensorrt", version)
    module.QuickPluginCreationRequest = object  # type: ignore[attr-defined]
    with pytest.raises(
        UnavailableError, match=r"do not work with NumPy .*: pip install 'numpy<2\.4', or TensorRT 11\.2$"
    ):
        register_plugins(module, 80)
