"""The part of lmms-eval 0.7 that an adapter meets: its names, signatures and checks, without its 60 dependencies."""

from __future__ import annotations

import abc
import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest


class CacheHook:
    """`lmms_eval.api.model.CacheHook`, which here remembers what it is told."""

    def __init__(self, cachinglm: object = None) -> None:
        del cachinglm
        self.seen: list[tuple[str, object, object]] = []

    def add_partial(self, attr: str, req: object, res: object) -> None:
        self.seen.append((attr, req, res))


class Lmms(abc.ABC):
    """`lmms_eval.api.model.lmms`."""

    is_simple: bool = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.cache_hook = CacheHook(None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        def value(text: str) -> int | float | str:
            for kind in (int, float):
                try:
                    return kind(text)
                except ValueError:
                    continue
            return text

        given = {key: value(text) for key, text in (pair.split("=") for pair in arg_string.split(","))}
        return cls(**given, **{key: found for key, found in (additional_config or {}).items() if found is not None})


@dataclass
class Instance:
    """`lmms_eval.api.instance.Instance`."""

    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def provide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the package importable, unless the real one is."""
    if importlib.util.find_spec("lmms_eval") is not None:
        return
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms, "CacheHook": CacheHook},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        for attribute, value in attributes.items():
            monkeypatch.setattr(module, attribute, value, raising=False)
        monkeypatch.setitem(sys.modules, name, module)
