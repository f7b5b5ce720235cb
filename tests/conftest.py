"""Settings and fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.models.tiny import TinySpec, make_llava
from tests.models.traces import traced_once

# The same examples in every run: a failure in CI is a failure here. Shared machines make deadlines meaningless.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA: GQA, untied, odd vocabulary, float16, 25 vision tokens."""
    return make_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava", TinySpec())


@pytest.fixture(scope="session", autouse=True)
def real_trace() -> Iterator[Callable[..., Any]]:
    """Every configuration is traced once; the value is what traces anew."""
    with traced_once() as original:
        yield original
