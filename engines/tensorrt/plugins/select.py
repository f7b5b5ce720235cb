"""The plugins that select diverse tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from qavp_export.engines.kernels.select import rows_shape, select_dpp_spec, select_grid, select_maxmin_spec
from qavp_export.engines.kernels.similarity import (
    token_codes_grid,
    token_codes_spec,
    token_products_grid,
    token_products_spec,
)
from qavp_export.engines.tensorrt.functions import SELECT_DPP, SELECT_MAXMIN, TOKEN_CODES, TOKEN_PRODUCTS
from qavp_export.engines.tensorrt.plugins.plugin import Compiler, Launch, Plugin, Setting, Tensor
from qavp_export.numerics.diverse import MOST_CHANNELS


class TokenCodes(Plugin):
    """`image_features [B,N,D]` -> `codes [B,N,code_width(D)]` INT8."""

    name = TOKEN_CODES
    inputs = ("image_features",)
    settings = MappingProxyType({})
    outputs = ("INT8",)

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns the features' shape, with no more channels than a sketch has."""
        del settings
        images, tokens, width = inputs[0]
        # Expressions have no minimum of their own; a comparison is 0 or 1.
        is_less = width < MOST_CHANNELS
        return [(images, tokens, (width - MOST_CHANNELS) * is_less + MOST_CHANNELS)]

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `token_codes`."""
        del settings, tactic, cdiv
        (features,) = inputs
        kernel = compiler(token_codes_spec(features.dtype, features.size(-1)))
        return Launch(kernel, token_codes_grid(features.rows))


class TokenProducts(Plugin):
    """`codes [B,N,D]` -> `products [B,N,N]`."""

    name = TOKEN_PRODUCTS
    inputs = ("codes",)
    settings = MappingProxyType({})
    outputs = ("FLOAT",)

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns the codes' shape with tokens for channels."""
        del settings
        images, tokens, _ = inputs[0]
        return [(images, tokens, tokens)]

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `token_products`."""
        del settings, tactic, cdiv
        (codes,) = inputs
        tokens = codes.size(1)
        return Launch(compiler(token_products_spec(tokens, codes.size(2))), token_products_grid(codes.exprs[0], tokens))


class SelectDpp(Plugin):
    """`products [B,N,N]` and `score [B,N]` -> `indices` and `order [B,k]` INT32; the last output is scratch memory."""

    name = SELECT_DPP
    inputs = ("products", "score")
    settings = MappingProxyType({"kept": int})
    outputs = ("INT32", "INT32", "FLOAT")

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns a number for each token that is kept, twice, and what `rows_shape` says."""
        images, tokens, _ = inputs[0]
        kept = int(settings["kept"])
        return [(images, kept), (images, kept), (images, *rows_shape(tokens, kept))]

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `select_dpp`."""
        del tactic, cdiv
        products = inputs[0]
        kernel = compiler(select_dpp_spec(products.size(1), int(settings["kept"])))
        return Launch(kernel, select_grid(products.exprs[0]))


class SelectMaxmin(Plugin):
    """`products [B,N,N]` -> `indices` and `order [B,k]` INT32."""

    name = SELECT_MAXMIN
    inputs = ("products",)
    settings = MappingProxyType({"kept": int})
    outputs = ("INT32", "INT32")

    def shapes(self, inputs: Sequence[Sequence[Any]], settings: Mapping[str, Setting]) -> list[tuple[Any, ...]]:
        """Returns a number for each token that is kept, twice."""
        images, kept = inputs[0][0], int(settings["kept"])
        return [(images, kept), (images, kept)]

    def launch(
        self, inputs: Sequence[Tensor], settings: Mapping[str, Setting], tactic: int, compiler: Compiler, cdiv: Any
    ) -> Launch:
        """Returns a launch of `select_maxmin`."""
        del tactic, cdiv
        products = inputs[0]
        kernel = compiler(select_maxmin_spec(products.size(1), int(settings["kept"])))
        return Launch(kernel, select_grid(products.exprs[0]))
