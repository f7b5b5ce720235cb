"""The journal remembers what was finished, whatever ended the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from qavp_export.journal import Journal


def test_entries_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal["identity"] = {"recipe": [1, 2.5, None]}
    errors = journal.section("error")
    errors["layer/0"] = 0.25
    again = Journal(tmp_path / "journal")
    assert dict(again) == {"identity": {"recipe": [1, 2.5, None]}, "error/layer/0": 0.25}
    assert dict(again.section("error")) == {"layer/0": 0.25}
    assert len(again.section("error")) == 1
    assert "layer/0" not in again.section("other")


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal["whole"] = 1
    journal["cut"] = 2
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    # Without its newline alone a line is still whole.
    assert dict(again) == ({"whole": 1, "cut": 2} if cut == 1 else {"whole": 1})
    again["next"] = 3
    assert Journal(path)["next"] == 3


def test_nothing_is_taken_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal["a"] = 1
    with pytest.raises(TypeError, match="stays finished"):
        del journal["a"]
