"""Settings and fixtures that all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.models.tiny import TinySpec, make_llava
from tests.models.traces import Tracer, traced_once

# The same examples in every run: a failure in CI is a failure here. Shared machines make deadlines meaningless.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA: GQA, untied, odd vocabulary, float16, 25 vision tokens."""
    return make_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava", TinySpec())


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all of its worker processes see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def trace_anew(shared_folder: Path) -> Iterator[Tracer]:
    """Every module is traced once; the value is what traces anew."""
    with traced_once(shared_folder) as anew:
        yield anew


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Hides what outlives a module from the garbage collector: to exports, which call it, it is half of their time."""
    gc.collect()
    gc.freeze()
