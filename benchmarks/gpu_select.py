"""Checks the kernels of diverse selection against the NumPy reference on fresh random data, and times them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from gpu_kernels import TORCH_TYPES
from gpu_report import Check, Timing
from gpu_timing import Kernels, Launch, time_launches

from qavp_export.engines.kernels import select, similarity
from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.numerics.diverse import Diversity, choose_diverse, code_width

# Types, images, tokens, channels, tokens to choose.
Case = tuple[str, int, int, int, int]

CHECKED: tuple[Case, ...] = (
    ("fp32", 1, 576, 4096, 72),
    ("fp16", 3, 729, 1152, 91),
    ("bf16", 2, 257, 3584, 257),
    ("fp32", 2, 2880, 1024, 40),
    ("fp16", 5, 1, 131, 1),
)
# With the goal of issue 8 at one picture.
TIMED: tuple[tuple[Case, float | None], ...] = (
    (("fp32", 1, 576, 4096, 72), 150.0),
    (("fp32", 64, 576, 4096, 72), None),
    (("fp32", 1, 2880, 4096, 360), None),
    (("fp16", 1, 576, 4096, 72), 150.0),
)
# What is not read at once is in the cache: the stage before has just written it.
_SETS = 4


def select_specs() -> Iterator[KernelSpec]:
    """Yields every kernel that `SelectBench` checks and times."""
    for case in (*CHECKED, *(case for case, _ in TIMED)):
        for rule in get_args(Diversity):
            yield from _specs(case, rule)


def _specs(case: Case, rule: Diversity) -> tuple[KernelSpec, KernelSpec, KernelSpec]:
    dtype, _, tokens, width, kept = case
    choose = select.select_dpp_spec if rule == "dpp" else select.select_maxmin_spec
    products = similarity.token_products_spec(tokens, code_width(width))
    return similarity.token_codes_spec(dtype, width), products, choose(tokens, kept)


class SelectBench:
    """Checks and times the kernels of diverse selection on one GPU.

    Args:
        kernels: Compiles and loads them.
        seed: Of the random data.
    """

    def __init__(self, kernels: Kernels, seed: int) -> None:
        self._kernels = kernels
        self._random = torch.Generator("cuda").manual_seed(seed)

    def check(self) -> Iterator[Check]:
        """Compares choices with the reference: the same tokens in the same order."""
        for case in CHECKED:
            for rule in get_args(Diversity):
                yield self._check(case, rule)

    def _check(self, case: Case, rule: Diversity) -> Check:
        features, score = self._draw(case)
        launches, (indices, order) = self._bind(case, rule, features, score)
        for launch in launches:
            launch()
        wanted = choose_diverse(rule, features.float().cpu().numpy(), score.cpu().numpy(), case[-1])
        wrong = int((order.cpu().numpy() != wanted).sum())
        unsorted = int((indices != order.sort(dim=-1).values).sum())
        detail = f"{wrong} choices differ, {unsorted} are out of order"
        return Check(f"select_{rule}", _name(case), wrong == unsorted == 0, detail)

    def time(self) -> Iterator[Timing]:
        """Times all launches together, and each alone."""
        for case, goal in TIMED:
            for rule in get_args(Diversity):
                bound = [self._bind(case, rule, *self._draw(case))[0] for _ in range(_SETS)]
                together = len(bound[0]) * time_launches([launch for launches in bound for launch in launches])
                compared, ratio = ("microseconds", together) if goal is not None else ("", None)
                yield Timing(f"select {rule}", _name(case), together, compared, ratio, goal, at_most=True)
                names = ("token_codes", "token_products", f"select_{rule}")
                for name, alone in zip(names, zip(*bound, strict=True), strict=True):
                    yield Timing(f"{name} alone", _name(case), time_launches(alone))

    def _draw(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns random features that have much in common, as an image's tokens have, some twice, and a score."""
        dtype, images, tokens, width, _ = case
        values = torch.randn((images, tokens, width), generator=self._random, device="cuda")
        values += 2 * torch.randn((images, 1, width), generator=self._random, device="cuda")
        values[:, 1::5] = values[:, :-1:5].clone()
        score = torch.rand((images, tokens), generator=self._random, device="cuda")
        return values.to(TORCH_TYPES[dtype]), score

    def _bind(
        self, case: Case, rule: Diversity, features: torch.Tensor, score: torch.Tensor
    ) -> tuple[Sequence[Launch], tuple[torch.Tensor, torch.Tensor]]:
        _, images, tokens, width, kept = case
        codes = torch.full((images, tokens, code_width(width)), -77, dtype=torch.int8, device="cuda")
        products = torch.full((images, tokens, tokens), float("nan"), device="cuda")
        indices, order = (torch.full((images, kept), -1, dtype=torch.int32, device="cuda") for _ in range(2))
        rows = torch.full((images, *select.rows_shape(tokens, kept)), float("nan"), device="cuda")
        of_codes, of_products, of_choice = _specs(case, rule)
        chosen = [products, score, indices, order, rows] if rule == "dpp" else [products, indices, order]
        launches = (
            self._kernels.bind(of_codes, similarity.token_codes_grid(images * tokens), [features, codes]),
            self._kernels.bind(of_products, similarity.token_products_grid(images, tokens), [codes, products]),
            self._kernels.bind(of_choice, select.select_grid(images), chosen),
        )
        return launches, (indices, order)


def _name(case: Case) -> str:
    dtype, images, tokens, width, kept = case
    return f"{images} x {tokens} x {width} -> {kept} {dtype}"
