"""How `w4a4_matmul` cuts its work, by token count, layer and GPU.

The choices were among the fastest that `benchmarks/gpu_check.py --tune` timed on an H200 and an H100 at LLaVA-1.5-7B's
sizes; for other GPUs they come from counting and from the assembler's reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

# Programs that keep a data-center GPU busy (132 multiprocessors were measured): more parts of K than this makes cost
# more than idle multiprocessors. In wide tiles, of which a multiprocessor holds two, fewer leave some idle.
_PROGRAMS = 384
_WIDE_PROGRAMS = 264
_MAX_SPLIT = 8
# Fewer weight bytes of a row than this in a part of K, and starting costs more than the part.
_MIN_PART_BYTES = 512
# Where all of K is one program's: tiles of tokens, and how many programs make one of them large enough.
_BUSY_BLOCKS = (32, 64, 128)
_BUSY_PROGRAMS = 192
_GEMV_TOKENS = 1
_MANY_TOKENS = 512


@dataclass(frozen=True)
class GemvTiling:
    """How `w4a4_gemv` cuts its work; all powers of two.

    Attributes:
        outputs: Output channels of a program.
        words: Words of eight codes that a program reads of a row at a time: 128 for each warp, so that a thread reads
            16 bytes of each row.
        num_warps: Warps of a program.
        split_k: Parts of K: one.
    """

    outputs: int
    words: int
    num_warps: int
    split_k: int = 1


@dataclass(frozen=True)
class MatmulTiling:
    """How `w4a4_matmul` cuts its work; all but `split_k` powers of two.

    Attributes:
        tokens: Tokens of a program.
        extra_tokens: Tokens of a program beyond those, or 0: 128 and 16 cover 136 tokens with little waste.
        outputs: Output channels of a program: 64 for each four warps on compute capability 9.0.
        num_warps: Warps of a program.
        num_stages: Tiles in flight.
        row_bytes: Most weight bytes of a row in a tile; half a group at most.
        unroll: Tiles between two barriers.
        split_k: Parts of K, each with programs of its own; above 1 `w4a4_reduce` must follow.
        max_registers: Most registers of a thread, so that two programs of eight warps fit; None: no limit.
        join: Whether both halves of a group go into one product: right for 9.0, where operands come from registers.
    """

    tokens: int
    extra_tokens: int
    outputs: int
    num_warps: int
    num_stages: int
    row_bytes: int = 64
    unroll: int = 1
    split_k: int = 1
    max_registers: int | None = None
    join: bool = False


Tiling: TypeAlias = GemvTiling | MatmulTiling


def matmul_tiling(tokens: int, inputs: int, outputs: int, capability: int, one_launch: bool = False) -> Tiling:
    """Chooses a tiling.

    Args:
        tokens: T, at least 1.
        inputs: K.
        outputs: N.
        capability: What the kernel is compiled for, such as 80 or 90.
        one_launch: Do not split K: for callers with no memory for sums, such as a TensorRT plugin.
    """
    if tokens <= _GEMV_TOKENS:
        return GemvTiling(outputs=2, words=512, num_warps=4)
    join = capability == 90
    if tokens > _MANY_TOKENS:
        # Twice as wide where the sums of two programs fit in registers without spilling.
        narrow = MatmulTiling(128, 0, 64, num_warps=4, num_stages=3, join=join)
        wide = replace(narrow, outputs=128, num_warps=8, max_registers=128)
        return wide if join and -(-outputs // 128) * -(-tokens // 128) >= _WIDE_PROGRAMS else narrow
    rows = -(-outputs // 64)
    if one_launch:
        return _busy(tokens, inputs, rows, join)
    block, extra = _token_block(tokens)
    split = _split(rows * -(-tokens // (block + extra)), inputs)
    return MatmulTiling(block, extra, 64, num_warps=4, num_stages=3 if block > 32 else 4, split_k=split, join=join)


def _busy(tokens: int, inputs: int, rows: int, join: bool) -> MatmulTiling:
    """Returns the largest tile of tokens that leaves enough programs, of all K each, to keep the GPU busy.

    Args:
        tokens: T.
        inputs: K.
        rows: Tiles of output channels.
        join: See `MatmulTiling`.
    """
    if tokens <= 16:
        return MatmulTiling(16, 0, 64, num_warps=4, num_stages=5, join=join)
    programs = {block: rows * -(-tokens // block) for block in _BUSY_BLOCKS}
    block = max((block for block in _BUSY_BLOCKS if programs[block] >= _BUSY_PROGRAMS), default=_BUSY_BLOCKS[0])
    tiling = MatmulTiling(block, 0, 64, num_warps=4, num_stages=5, join=join)
    # The fewer programs share a multiprocessor, the more tiles each must have in flight.
    if block == 64:
        halves = inputs % (4 * tiling.row_bytes) == 0
        return replace(tiling, num_stages=3, unroll=2) if halves else replace(tiling, num_stages=4)
    if block == 128:
        return replace(tiling, num_stages=4 if programs[block] <= _WIDE_PROGRAMS else 3)
    return tiling


def candidate_tilings(tokens: int, inputs: int, outputs: int, capability: int) -> Sequence[Tiling]:
    """Returns at most nine tilings for one token count, the default first: what a run on a GPU chooses from."""
    default = matmul_tiling(tokens, inputs, outputs, capability)
    if isinstance(default, GemvTiling):
        shapes = [(2, 256, 2), (2, 128, 1), (4, 128, 1), (4, 512, 4), (1, 512, 4), (2, 1024, 8), (1, 1024, 8)]
        return [default, *(GemvTiling(*shape) for shape in shapes)]
    if tokens > _MANY_TOKENS:
        square = replace(default, outputs=128, num_warps=8)
        changed = [
            replace(square, max_registers=128),
            replace(square, max_registers=128, num_stages=4),
            replace(square, max_registers=128, num_stages=2, unroll=2),
            replace(default, outputs=64, num_warps=4, max_registers=None),
            replace(square, tokens=256, max_registers=None),
            replace(square, tokens=256, num_stages=4, max_registers=None),
            replace(square, outputs=256, max_registers=None),
            replace(square, num_warps=4, max_registers=None),
        ]
        return [default, *(tiling for tiling in changed if tiling != default)]
    splits = [split for split in (1, 2, 3, 4, 6, 8) if split != default.split_k][: 5 if tokens > 16 else 6]
    wide = replace(default, outputs=128, num_warps=8, num_stages=3)
    return [default, *(replace(default, split_k=split) for split in splits), wide, replace(default, unroll=2)][:8]


def _token_block(tokens: int) -> tuple[int, int]:
    """Returns the tile of tokens, and the tile beside it, that leave least unused; blocks of 16 to 128 tokens."""
    options = [(block, extra) for block in (16, 32, 64, 128) for extra in (0, 16) if extra < block]

    def cost(option: tuple[int, int]) -> int:
        # Each block unpacks the weight again, which costs about as much as the product with 64 tokens.
        block = sum(option)
        return -(-tokens // block) * (block + 64)

    return min(options, key=cost)


def _split(programs: int, inputs: int) -> int:
    """Returns in how many parts K is cut for the GPU to be busy."""
    most = min(_MAX_SPLIT, inputs // 2 // _MIN_PART_BYTES, _PROGRAMS // programs)
    return max(1, most)
