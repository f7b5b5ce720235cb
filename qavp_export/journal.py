"""What an export has finished, kept on disk so that an interrupted one can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any


class Journal(MutableMapping[str, Any]):
    """A mapping to JSON values that survives the process; entries are set once and never removed.

    Each entry is one appended line. A line that was cut off by the end of the process does not count.

    Args:
        path: The file; it is made when the first entry is set.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        if path.is_file():
            for line in path.read_bytes().split(b"\n"):
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self._entries[str(key)] = value

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        # The newline comes first: it ends a line that an earlier process left unfinished.
        with self._path.open("ab") as file:
            file.write(b"\n" + json.dumps([key, value]).encode() + b"\n")
        self._entries[key] = value

    def __delitem__(self, key: str) -> None:
        raise TypeError("what is finished stays finished")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def section(self, name: str) -> Section:
        """Returns the entries whose keys begin with `name/`, without that prefix; they may be set there too."""
        return Section(self, name)


class Section(MutableMapping[str, Any]):
    """One part of a journal; see `Journal.section`."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal = journal
        self._prefix = f"{name}/"

    def __getitem__(self, key: str) -> Any:
        return self._journal[self._prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._journal[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._journal[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._journal if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
