"""Ahead-of-time compilation of kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qavp_export.engines.kernels.compile import KernelSpec, compile_kernel, without_hidden_arguments
from qavp_export.engines.kernels.quantize import quantize_two_level_spec
from qavp_export.engines.kernels.score import mix_token_score_spec, token_sensitivity_spec
from qavp_export.engines.kernels.select import select_dpp_spec, select_maxmin_spec
from qavp_export.engines.kernels.similarity import token_codes_spec, token_products_spec
from qavp_export.errors import UnavailableError
from tests.kernels.assembler import ARCHITECTURES, assemble

# What bundles are built with, and what stresses registers most.
SPECS = {
    "sensitivity": token_sensitivity_spec("fp16", 4096, 128),
    "sensitivity-rms-bf16": token_sensitivity_spec("bf16", 1152, 128, "rms"),
    "mix": mix_token_score_spec(576, 0.5),
    "codes": token_codes_spec("fp32", 4096),
    "products": token_products_spec(576, 1024),
    "dpp": select_dpp_spec(576, 72),
    "dpp-2880": select_dpp_spec(2880, 360),
    "maxmin": select_maxmin_spec(2880, 360),
    "quantize": quantize_two_level_spec("fp16", 4096, 128),
    "quantize-rotated": quantize_two_level_spec("fp32", 11008, 128, rotate=True),
}
ENTRY = """.version 8.4
.visible .entry kernel(
\t.param .u64 .ptr .global .align 16 kernel_param_0,
\t.param .u32 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2,
\t.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid 128
{
\tld.param.b64 %rd1, [kernel_param_0];
}
"""


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_ptx_for_capability_80_assembles_for_every_generation(spec: KernelSpec) -> None:
    compiled = compile_kernel(spec, 80)
    assert compiled.arguments == tuple(spec.signature.items())
    assert (compiled.name, compiled.num_warps, compiled.capability) == (spec.function, spec.num_warps, 80)
    for architecture in ARCHITECTURES:
        assembled = assemble(compiled, architecture)
        assert assembled.spilled_bytes == assembled.stack_bytes == 0
        # A block of 32 * num_warps threads must find its registers on a multiprocessor.
        assert assembled.registers * 32 * spec.num_warps <= 65536


@pytest.mark.parametrize("capability", [90, 120])
def test_ptx_for_a_newer_architecture_itself_assembles(capability: int) -> None:
    compiled = compile_kernel(SPECS["sensitivity"], capability)
    assert assemble(compiled, f"sm_{capability}a").spilled_bytes == 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_ptx_declares_what_a_launcher_passes(spec: KernelSpec) -> None:
    ptx = compile_kernel(spec, 80).ptx
    declared = re.findall(r"\.param \.(\w+) [^\n]*?(\w+_param_\d+)", ptx)
    types = ["u32" if kind == "i32" else "u64" for kind in spec.signature.values()]
    assert [kind for kind, _ in declared] == types
    # CUDA 13.0's driver knows PTX 9.0, 12.4's 8.4.
    assert ".version 8.4\n" in ptx


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_the_assembler_may_not_fuse_or_approximate(spec: KernelSpec) -> None:
    """Without `.rn` it may fuse a multiplication into an addition; `full` and `approx` are a quotient's shortcuts."""
    ptx = compile_kernel(spec, 80).ptx
    assert not re.findall(r"\b(?:mul|add|sub)\.f32", ptx)
    if spec.function != "token_sensitivity":
        assert not re.findall(r"\b(?:div|rcp|sqrt)\.(?:full|approx)", ptx)
    assert not re.findall(r"\b(?:mul|add|sub|fma|div|sqrt)\.(?:rn\.)?ftz", ptx)


@pytest.mark.parametrize("spec", [SPECS["quantize-rotated"], SPECS["sensitivity"]], ids=["quantize", "sensitivity"])
def test_memory_is_read_sixteen_bytes_at_a_time(spec: KernelSpec) -> None:
    loads = re.findall(r"ld\.global\S*", compile_kernel(spec, 80).ptx)
    assert set(loads) == {"ld.global.v4.b32"}


def test_scratch_pointers_are_removed() -> None:
    name, ptx = without_hidden_arguments(ENTRY, 2)
    assert name == "kernel"
    assert ptx == ENTRY.replace(
        ",\n\t.param .u64 .ptr .global .align 1 kernel_param_2,\n\t.param .u64 .ptr .global .align 1 kernel_param_3", ""
    )


def test_scratch_pointers_that_are_read_are_refused() -> None:
    with pytest.raises(ValueError, match="reads its scratch pointer kernel_param_3"):
        without_hidden_arguments(ENTRY.replace("[kernel_param_0]", "[kernel_param_3]"), 2)


@pytest.mark.parametrize("declared", [1, 3])
def test_another_number_of_arguments_is_refused(declared: int) -> None:
    with pytest.raises(ValueError, match=f"has 4 arguments; expected {declared} \\+ 2"):
        without_hidden_arguments(ENTRY, declared)


def test_specifications_must_fit_the_function() -> None:
    spec = SPECS["mix"]
    with pytest.raises(ValueError, match="mix_token_score takes"):
        compile_kernel(replace(spec, signature=dict(reversed(spec.signature.items()))), 80)
    with pytest.raises(ValueError, match=r"unknown: \['scores'\]"):
        compile_kernel(replace(spec, aligned=frozenset({"scores"})), 80)


def test_a_process_that_interprets_refuses_to_compile() -> None:
    program = (
        "from qavp_export.engines.kernels.compile import compile_kernel\n"
        "from qavp_export.engines.kernels.score import mix_token_score_spec\n"
        "from qavp_export.errors import UnavailableError\n"
        "try: compile_kernel(mix_token_score_spec(5, 0.5), 80)\n"
        "except UnavailableError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "unset TRITON_INTERPRET" in result.stdout


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.compiler", None)
    with pytest.raises(UnavailableError, match="pip install triton"):
        compile_kernel(SPECS["mix"], 80)
