"""`w4a4_matmul` against 64-bit integer products of the reference's codes, and what it compiles to."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from qavp_export.engines.kernels import matmul
from qavp_export.engines.kernels.compile import KernelSpec, compile_kernel
from qavp_export.engines.kernels.matmul import (
    w4a4_matmul_grid,
    w4a4_matmul_spec,
    w4a4_reduce_grid,
    w4a4_reduce_spec,
)
from qavp_export.engines.kernels.packing import pack_weight
from qavp_export.engines.kernels.tilings import (
    GemvTiling,
    MatmulTiling,
    Tiling,
    candidate_tilings,
    matmul_tiling,
)
from qavp_export.errors import InputError, RecipeError
from qavp_export.numerics.two_level import quantize_two_level
from tests.kernels.assembler import ARCHITECTURES, assemble
from tests.kernels.interpreter import Interpreter

NUMPY = {"fp16": np.float16, "fp32": np.float32}
GEMV = GemvTiling(outputs=2, words=64, num_warps=4)
SMALL = MatmulTiling(tokens=16, extra_tokens=0, outputs=16, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer and its input."""

    products: npt.NDArray[np.int8]
    steps: npt.NDArray[np.float32]
    weight: npt.NDArray[np.int8]
    multipliers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    sums: npt.NDArray[np.int64]
    group_size: int

    def expected(self, dtype: str) -> npt.NDArray[np.floating]:
        """The kernel's float32 operations on the exact sums."""
        y = self.sums.astype(np.float32) * (self.steps[:, None] * self.scales[None, :])
        return y.astype(NUMPY[dtype])

    def run(self, interpreter: Interpreter, tiling: Tiling, dtype: str = "fp32") -> npt.NDArray[np.generic]:
        """Interprets the kernel; outputs are poisoned."""
        tokens, outputs = self.sums.shape
        spec = w4a4_matmul_spec(self.products.shape[1], outputs, self.group_size, tiling, dtype, use_ptx=False)
        if tiling.split_k > 1:
            output: npt.NDArray[np.generic] = np.full((tiling.split_k, tokens, outputs), -77, np.int32)
        else:
            output = np.full((tokens, outputs), np.nan, NUMPY[dtype])
        arguments = {
            "products": self.products,
            "steps": self.steps,
            "weight": self.weight,
            "multipliers": self.multipliers,
            "scales": self.scales,
            "tokens": tokens,
            "output": output,
        }
        return interpreter.run(spec, w4a4_matmul_grid(tokens, outputs, tiling), arguments)["output"]


def make_layer(tokens: int, inputs: int, outputs: int, group_size: int, seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    # Groups of different loudness, so that multipliers differ.
    loudness = np.exp2(rng.uniform(-3, 0, inputs // group_size)).repeat(group_size)
    x = quantize_two_level((rng.standard_normal((tokens, inputs)) * loudness).astype(np.float32), group_size)
    w = quantize_two_level((rng.standard_normal((outputs, inputs)) * loudness[::-1]).astype(np.float32), group_size)
    products = x.codes * x.multipliers.repeat(group_size, axis=1).astype(np.int8)
    factors = w.codes.astype(np.int64) * w.multipliers.repeat(group_size, axis=1)
    weight, multipliers = pack_weight(np.ascontiguousarray(w.codes.T), w.multipliers.T, group_size)
    sums = products.astype(np.int64) @ factors.T
    return Layer(products, x.steps, weight, multipliers, w.steps, sums, group_size)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group_size", "tiling"),
    [
        (1, 384, 37, 128, GEMV),
        (1, 11 * 16, 5, 16, GEMV),
        (3, 192, 7, 64, replace(GEMV, outputs=1, words=8)),
        (1, 1024, 4, 512, replace(GEMV, outputs=4)),
        (5, 384, 37, 128, SMALL),
        (5, 384, 37, 128, replace(SMALL, join=True)),
        (19, 640, 37, 128, replace(SMALL, extra_tokens=16, join=True, unroll=2)),
        (19, 640, 37, 128, replace(SMALL, extra_tokens=16, row_bytes=32, unroll=2)),
        (150, 64, 70, 64, SMALL),
        (7, 11 * 16, 18, 16, SMALL),
        (7, 11 * 16, 18, 16, replace(SMALL, join=True, unroll=2)),
        (2, 3 * 32, 18, 32, replace(SMALL, join=True)),
        (2, 1024, 18, 512, replace(SMALL, join=True)),
        (2, 768, 18, 256, replace(SMALL, row_bytes=128)),
    ],
)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_y_is_the_reference(
    interpreter: Interpreter,
    tokens: int,
    inputs: int,
    outputs: int,
    group_size: int,
    tiling: Tiling,
    dtype: str,
) -> None:
    layer = make_layer(tokens, inputs, outputs, group_size)
    np.testing.assert_array_equal(layer.run(interpreter, tiling, dtype), layer.expected(dtype))


@pytest.mark.parametrize(("split_k", "unroll", "join"), [(2, 1, False), (3, 2, True), (8, 1, True)])
def test_parts_of_k_add_up(interpreter: Interpreter, split_k: int, unroll: int, join: bool) -> None:
    # 11 half groups: no split is even, and with eight parts the last ones are empty.
    layer = make_layer(tokens=5, inputs=11 * 64, outputs=37, group_size=64)
    tiling = replace(SMALL, split_k=split_k, unroll=unroll, join=join)
    sums = layer.run(interpreter, tiling)
    np.testing.assert_array_equal(sums.astype(np.int64).sum(axis=0), layer.sums)
    arguments = {
        "sums": sums,
        "steps": layer.steps,
        "scales": layer.scales,
        "tokens": 5,
        "output": np.full((5, 37), np.nan, np.float16),
    }
    reduced = interpreter.run(w4a4_reduce_spec(37, split_k), w4a4_reduce_grid(5, 37), arguments)["output"]
    np.testing.assert_array_equal(reduced, layer.run(interpreter, replace(tiling, split_k=1), "fp16"))


@pytest.mark.parametrize(("tokens", "first"), [(136, 128), (136, 64), (8, 0), (64, 0), (65, 64)])
def test_places_without_a_token_are_spread_over_others(interpreter: Interpreter, tokens: int, first: int) -> None:
    # Where all read the last token, a GPU took up to 2.5 times as long.
    size, last = 64, tokens - 1 - first
    spec = KernelSpec(
        "tests.kernels.probes",
        "existing_tokens",
        {"last": "i32", "first_token": "i32", "result": "*i32"},
        {"SIZE": 64},
        1,
    )
    arguments = {"last": last, "first_token": first, "result": np.full(size, -77, np.int32)}
    read = first + interpreter.run(spec, (1, 1, 1), arguments)["result"]
    np.testing.assert_array_equal(read[: last + 1], np.arange(first, min(first + size, tokens)))
    assert ((read >= 0) & (read < tokens)).all()
    assert np.bincount(read).max() == -(-size // min(size, tokens))


@pytest.mark.parametrize(
    "tiling", [GemvTiling(outputs=2, words=4096, num_warps=4), replace(SMALL, outputs=2, row_bytes=256, join=True)]
)
@pytest.mark.parametrize("code", [-8, 7])
def test_extremes_do_not_overflow(interpreter: Interpreter, tiling: Tiling, code: int) -> None:
    # The largest K that numerics section 3 allows, to a group: sums reach 2,145,484,800.
    inputs, outputs = 149_130 // 512 * 512, 2
    codes, multipliers = np.full((inputs, outputs), code, np.int8), np.full((inputs // 512, outputs), 15, np.int8)
    weight, packed_multipliers = pack_weight(codes, multipliers, 512)
    ones = np.ones(outputs, np.float32)
    sums = np.full((1, outputs), inputs * -120 * 15 * code, np.int64)
    products = np.full((1, inputs), -120, np.int8)
    layer = Layer(products, ones[:1], weight, packed_multipliers, ones, sums, 512)
    np.testing.assert_array_equal(layer.run(interpreter, tiling), layer.expected("fp32"))


def test_inline_ptx_multiplies_codes_in_place() -> None:
    # Executes the PTX on every byte, beside neighbours that would receive or send a carry.
    words = np.array([byte * scale & 0xFFFFFFFF for byte in range(256) for scale in (1, 0x01010101, 0xFF01FF01)])
    words = np.concatenate([words, words ^ 0xF0F0F0F0, words ^ 0x0F0F0F0F, words ^ 0x00FF00FF])
    for multiplier in range(1, 16):
        offset = (128 - 8 * multiplier) * 0x01010101
        low, high = _execute(str(matmul._UNPACK_PTX.value), {"$2": words, "$3": multiplier, "$7": offset})
        packed = words.astype(np.uint32).view(np.uint8)
        np.testing.assert_array_equal(low, (packed & 15).astype(np.int8) * multiplier - 8 * multiplier)
        np.testing.assert_array_equal(high, (packed >> 4).astype(np.int8) * multiplier - 8 * multiplier)


def _execute(
    ptx: str, registers: dict[str, npt.NDArray[np.int64] | int]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    for line in re.findall(r"^(?!\.reg)(\S+ .*);$", ptx, re.MULTILINE):
        operation, rest = line.split(" ", 1)
        target, *operands = [part.strip() for part in rest.split(",")]
        values = [registers[name] if name in registers else int(name, 0) for name in operands]
        match operation:
            case "and.b32":
                result = values[0] & values[1]
            case "xor.b32":
                result = values[0] ^ values[1]
            case "shr.u32":
                result = values[0] >> values[1]
            case "mad.lo.u32":
                result = values[0] * values[1] + values[2]
            case _:
                raise AssertionError(operation)
        registers[target] = result & 0xFFFFFFFF
    low, high = (np.asarray(registers[name]).astype(np.uint32).view(np.int8) for name in ("$0", "$1"))
    return low, high


@pytest.mark.parametrize(
    ("tokens", "instruction"),
    [(1, "dp4a.u32.s32"), (8, "mma.sync.aligned.m16n8k32"), (136, "mma.sync.aligned"), (2048, "mma.sync.aligned")],
)
def test_code_for_every_generation(tokens: int, instruction: str) -> None:
    compiled = compile_kernel(w4a4_matmul_spec(4096, 11008, 128, matmul_tiling(tokens, 4096, 11008, 80)), 80)
    assert instruction in compiled.ptx
    for architecture in ARCHITECTURES:
        assert assemble(compiled, architecture).spilled_bytes == 0


@pytest.mark.parametrize(("tokens", "registers"), [(8, 64), (136, 168), (2048, 128)])
def test_code_for_hopper(tokens: int, registers: int) -> None:
    compiled = compile_kernel(w4a4_matmul_spec(4096, 4096, 128, matmul_tiling(tokens, 4096, 4096, 90)), 90)
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", compiled.ptx)
    # Both operands reach shared memory in 16 bytes at a time; only multipliers are loaded by the byte.
    assert compiled.ptx.count("cp.async.cg.shared.global") >= 4
    assert len(re.findall(r"ld\.global(\.\w+)*\.b8 ", compiled.ptx)) <= 2
    assembled = assemble(compiled, "sm_90a")
    # Two programs of eight warps, or three of four, fit on a multiprocessor.
    assert assembled.registers <= registers
    assert assembled.spilled_bytes == 0


@pytest.mark.parametrize("capability", [100, 120])
def test_code_for_blackwell(capability: int) -> None:
    compiled = compile_kernel(
        w4a4_matmul_spec(4096, 4096, 128, matmul_tiling(136, 4096, 4096, capability), "bf16"), capability
    )
    assert assemble(compiled, f"sm_{capability}a").spilled_bytes == 0


def test_reduction_compiles() -> None:
    assert assemble(compile_kernel(w4a4_reduce_spec(4096, 4), 80), "sm_80").spilled_bytes == 0


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 136, 512, 640, 2048])
def test_candidates(tokens: int, capability: int) -> None:
    candidates = candidate_tilings(tokens, 4096, 11008, capability)
    assert candidates[0] == matmul_tiling(tokens, 4096, 11008, capability)
    assert len(set(candidates)) == len(candidates) <= 9
    assert matmul_tiling(tokens, 4096, 11008, capability, one_launch=True).split_k == 1


def test_136_tokens_waste_little() -> None:
    tiling = matmul_tiling(136, 4096, 4096, 90)
    assert isinstance(tiling, MatmulTiling)
    assert tiling.tokens + tiling.extra_tokens == 144


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "block", "split"),
    [
        (136, 4096, 4096, 64, 4),
        (136, 4096, 11008, 64, 2),
        (136, 11008, 4096, 64, 6),
        (640, 4096, 4096, 64, 1),
        (640, 11008, 4096, 64, 1),
        (640, 4096, 11008, 128, 1),
        (2048, 4096, 4096, 128, 1),
    ],
)
def test_defaults_are_what_was_fastest_on_an_h200(
    tokens: int, inputs: int, outputs: int, block: int, split: int
) -> None:
    tiling = matmul_tiling(tokens, inputs, outputs, 90)
    assert (tiling.outputs, tiling.split_k) == (block, split)


def test_what_the_kernel_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="int8"):
        w4a4_matmul_spec(256, 8, 128, SMALL, "int8")
    with pytest.raises(RecipeError, match="does not divide"):
        w4a4_matmul_spec(192, 8, 128, SMALL)


@pytest.mark.parametrize(
    ("tokens", "outputs", "block"),
    [
        # The largest block of which there are 192 programs; at least 32 tokens, but for those that fit in 16.
        (16, 4096, 16),
        (17, 4096, 32),
        (64, 4096, 32),
        (64, 11008, 32),
        (136, 4096, 64),
        (136, 11008, 128),
        (400, 4096, 128),
        (512, 1000, 32),
    ],
)
def test_one_launch_keeps_the_gpu_busy(tokens: int, outputs: int, block: int) -> None:
    tiling = matmul_tiling(tokens, 4096, outputs, 90, one_launch=True)
    assert isinstance(tiling, MatmulTiling)
    assert (tiling.tokens, tiling.extra_tokens, tiling.split_k) == (block, 0, 1)


@pytest.mark.parametrize(("inputs", "unroll"), [(4096, 2), (11008, 2), (1152, 1)])
def test_two_tiles_at_a_time_where_they_end_with_the_row(inputs: int, unroll: int) -> None:
    tiling = matmul_tiling(136, inputs, 4096, 90, one_launch=True)
    assert isinstance(tiling, MatmulTiling)
    assert (tiling.tokens, tiling.unroll) == (64, unroll)
    assert inputs // 2 % (tiling.row_bytes * unroll) == 0
