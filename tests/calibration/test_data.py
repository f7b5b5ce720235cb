"""Calibration data: what is read from JSONL and folders, what is drawn, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qavp_export.calibration import CalibrationItem, CalibrationSet, read_calibration
from qavp_export.errors import CalibrationError, InputError

ALL = 1000

JSON = st.recursive(
    st.none() | st.text(max_size=4) | st.sampled_from(["1.png", "..", "/", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"image": inner, "prompt": inner})
        | st.dictionaries(st.sampled_from(["image", "images", "prompt", "answer"]), inner)
    ),
    max_leaves=5,
)


def picture(path: Path, level: int = 0) -> Path:
    """Writes a picture of its own content and returns its path."""
    Image.new("RGB", (3, 5), (level, 7, 9)).save(path)
    return path


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with seven pictures and one JSONL file, which asks one question about each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(7):
        picture(folder / f"{index}.png", index)
    records = [{"image": f"{index}.png", "prompt": f"question {index}?"} for index in range(7)]
    return write_lines(folder / "ask.jsonl", *records)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three pictures, two of them with a prompt."""
    folder = tmp_path / "album"
    folder.mkdir()
    for level, name in enumerate(["a.jpg", "b.PNG", "c.webp"]):
        picture(folder / name, level)
    (folder / "a.txt").write_text("Who is this?\n")
    (folder / "c.txt").write_text("Où est-ce ?", encoding="utf-8")
    return folder


def prompts(drawn: CalibrationSet) -> list[str]:
    return [item.prompt for item in drawn.items]


def message(path: Path, limit: int = ALL) -> str:
    """The one line that reading `path` fails with."""
    with pytest.raises(CalibrationError) as caught:
        read_calibration(path, limit, seed=0)
    text = str(caught.value)
    assert text.isprintable()  # one line: a line break is not printable
    assert isinstance(caught.value, InputError)
    assert caught.value.exit_code == 2
    return text


def images_or_refusal(path: Path) -> list[Path] | str:
    try:
        return [image for item in read_calibration(path, ALL, seed=0).items for image in item.images]
    except CalibrationError as error:
        return str(error)


class TestJsonl:
    def test_a_line_is_an_item(self, table: Path) -> None:
        write_lines(table, {"image": "4.png", "prompt": "What?", "answer": "a cat"})
        drawn = read_calibration(table, ALL, seed=0)
        assert drawn.items == (CalibrationItem((table.parent / "4.png",), "What?", "a cat"),)
        assert drawn.name == "ask.jsonl"

    def test_a_folder_with_one_jsonl_file_is_read_as_that_file(self, table: Path) -> None:
        of_folder, of_file = read_calibration(table.parent, ALL, seed=0), read_calibration(table, ALL, seed=0)
        assert of_folder.items == of_file.items
        assert len(of_folder.items) == 7
        assert of_folder.name == "photos"

    def test_images_keep_the_order_of_their_list(self, table: Path) -> None:
        write_lines(table, {"images": ["6.png", "0.png", "6.png"], "prompt": "Same?", "answer": None})
        (item,) = read_calibration(table, ALL, seed=0).items
        assert [path.name for path in item.images] == ["6.png", "0.png", "6.png"]
        assert item.answer is None

    def test_question_is_another_name_of_prompt_and_unknown_keys_are_ignored(self, table: Path) -> None:
        write_lines(table, {"id": 3, "image": "1.png", "question": "What?"})
        assert prompts(read_calibration(table, ALL, seed=0)) == ["What?"]

    def test_an_image_may_lie_in_a_folder_below(self, table: Path) -> None:
        (table.parent / "sub").mkdir()
        picture(table.parent / "sub" / "x.png")
        write_lines(table, {"image": "sub/x.png", "prompt": "What?"})
        assert read_calibration(table, ALL, seed=0).items[0].images == (table.parent / "sub" / "x.png",)

    def test_blank_lines_and_what_windows_editors_write_are_accepted(self, table: Path) -> None:
        line = b'{"image": "1.png", "prompt": "What?"}'
        table.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \r\n" + line)
        assert prompts(read_calibration(table, ALL, seed=0)) == ["What?", "What?"]

    def test_links_to_the_data_and_within_them_are_followed(self, table: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(table.parent)
        (table.parent / "link.png").symlink_to("1.png")
        write_lines(table, {"image": "link.png", "prompt": "What?"})
        assert len(read_calibration(tmp_path / "link", ALL, seed=0).items) == 1


class TestPictures:
    def test_a_text_of_the_same_stem_is_the_prompt(self, pictures: Path) -> None:
        assert set(read_calibration(pictures, ALL, seed=0).items) == {
            CalibrationItem((pictures / "a.jpg",), "Who is this?", None),
            CalibrationItem((pictures / "b.PNG",), "Describe the image.", None),
            CalibrationItem((pictures / "c.webp",), "Où est-ce ?", None),
        }

    def test_other_files_and_hidden_ones_are_no_pictures(self, pictures: Path) -> None:
        (pictures / "._a.jpg").write_bytes(b"resource fork")
        (pictures / "notes.md").write_text("hello")
        (pictures / "sub").mkdir()
        assert len(read_calibration(pictures, ALL, seed=0).items) == 3

    def test_the_folder_gives_the_name_without_the_path(self, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(pictures)
        assert read_calibration(Path(), ALL, seed=0).name == "album"

    def test_a_name_that_is_not_utf8_can_be_recorded(self, pictures: Path) -> None:
        try:
            odd = pictures.rename(os.fsdecode(os.fsencode(pictures.parent) + b"/\xff"))
        except OSError:
            pytest.skip("this file system has UTF-8 names only")
        assert read_calibration(odd, ALL, seed=0).name.encode().isascii()


class TestDraw:
    def test_fewer_items_than_the_limit_are_all_taken_once(self, table: Path) -> None:
        for limit in (7, 8):
            assert sorted(prompts(read_calibration(table, limit, seed=5))) == [
                f"question {index}?" for index in range(7)
            ]

    def test_the_same_seed_draws_the_same(self, table: Path) -> None:
        assert read_calibration(table, 3, seed=5) == read_calibration(table, 3, seed=5)

    def test_a_smaller_limit_gives_the_first_items_of_a_larger_one(self, table: Path) -> None:
        larger = read_calibration(table, 7, seed=5).items
        for limit in range(1, 7):
            assert read_calibration(table, limit, seed=5).items == larger[:limit]

    def test_every_item_is_drawn_by_some_seed(self, table: Path) -> None:
        # A fair draw of 1 of 7 misses some item in 100 seeds with probability below 7 * (6/7)**100 = 1.5e-6.
        drawn = {prompts(read_calibration(table, 1, seed))[0] for seed in range(100)}
        assert drawn == {f"question {index}?" for index in range(7)}

    def test_the_draw_does_not_depend_on_the_order_of_a_folder_listing(
        self, pictures: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def listed(names: list[str]) -> CalibrationSet:
            def iterdir(folder: Path) -> Iterator[Path]:
                return (folder / name for name in names)

            monkeypatch.setattr(Path, "iterdir", iterdir)
            return read_calibration(pictures, 2, seed=1)

        names = ["a.jpg", "a.txt", "b.PNG", "c.txt", "c.webp"]
        assert listed(names) == listed(names[::-1])

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_below_one_is_refused(self, table: Path, limit: int) -> None:
        assert f"cannot calibrate on {limit} items" in message(table, limit)


class TestDigest:
    def digest(self, table: Path, record: dict[str, Any]) -> str:
        return read_calibration(write_lines(table, record), ALL, seed=0).digest

    def test_it_depends_on_content_alone_not_on_names(self, table: Path, tmp_path: Path) -> None:
        before = self.digest(table, {"image": "1.png", "prompt": "What?"})
        assert len(bytes.fromhex(before)) == 32
        (tmp_path / "elsewhere").mkdir()
        shutil.copy(table.parent / "1.png", tmp_path / "elsewhere" / "moved.png")
        moved = tmp_path / "elsewhere" / "other.jsonl"
        assert self.digest(moved, {"image": "moved.png", "question": "What?"}) == before

    def test_one_byte_of_an_image_changes_it(self, table: Path) -> None:
        record = {"image": "1.png", "prompt": "What?"}
        before = self.digest(table, record)
        data = bytearray((table.parent / "1.png").read_bytes())
        data[-1] ^= 1
        (table.parent / "1.png").write_bytes(data)
        assert self.digest(table, record) != before

    def test_every_field_and_its_bounds_count(self, table: Path) -> None:
        records: list[dict[str, Any]] = [
            {"image": "1.png", "prompt": "ab"},
            {"image": "2.png", "prompt": "ab"},
            {"images": ["1.png", "2.png"], "prompt": "ab"},
            {"images": ["2.png", "1.png"], "prompt": "ab"},
            {"image": "1.png", "prompt": "ab", "answer": "c"},
            {"image": "1.png", "prompt": "a", "answer": "bc"},
            {"image": "1.png", "prompt": "abc"},
        ]
        assert len({self.digest(table, record) for record in records}) == len(records)

    def test_only_the_drawn_items_count(self, table: Path) -> None:
        assert len({read_calibration(table, limit, seed=0).digest for limit in range(1, 8)}) == 7


class TestMalformed:
    @pytest.mark.parametrize(
        ("line", "finding"),
        [
            ("{'image': 'a'}", "is not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
            ("[1]", 'is not a JSON object; write {"image": FILE, "prompt": TEXT}'),
            ('{"image": "1.png"}', "has neither of prompt and question"),
            ('{"image": "1.png", "prompt": "a", "question": "a"}', "has both of prompt and question"),
            ('{"prompt": "a"}', "has neither of image and images"),
            ('{"image": "1.png", "images": ["1.png"], "prompt": "a"}', "has both of image and images"),
            ('{"image": 1, "prompt": "a"}', "image must be a file name"),
            ('{"image": "", "prompt": "a"}', "image must be a file name"),
            ('{"image": ["1.png"], "prompt": "a"}', "image must be a file name"),
            ('{"images": "1.png", "prompt": "a"}', "images must be a list of file names, at least one"),
            ('{"images": [], "prompt": "a"}', "images must be a list of file names, at least one"),
            ('{"images": ["1.png", null], "prompt": "a"}', "images must be a list of file names, at least one"),
            ('{"image": "1.png", "prompt": ""}', "prompt is empty"),
            ('{"image": "1.png", "question": " \\n"}', "question is empty"),
            ('{"image": "1.png", "prompt": null}', "prompt must be text"),
            ('{"image": "1.png", "prompt": "a", "answer": 3}', "answer must be text"),
            ('{"image": "1.png", "prompt": "a", "answer": ""}', "answer is empty"),
            ('{"image": "1.png", "prompt": "a\\ud83d"}', "prompt has a lone surrogate"),
            ('{"image": "1.png", "prompt": "a", "id": ' + "9" * 5000 + "}", "a number of too many digits"),
            ("[" * 100_000, "nested too deeply"),
        ],
    )
    def test_a_line(self, table: Path, line: str, finding: str) -> None:
        table.write_text('{"image": "1.png", "prompt": "good"}\n\n' + line + "\n")
        text = message(table)
        assert f"{table}, line 3" in text
        assert finding in text

    def test_a_bad_line_is_found_even_if_it_is_not_drawn(self, table: Path) -> None:
        with table.open("a") as file:
            file.write("oops\n")
        for seed in range(5):
            with pytest.raises(CalibrationError, match="line 8 is not valid JSON"):
                read_calibration(table, 1, seed)

    def test_bytes_that_are_not_utf8(self, table: Path) -> None:
        table.write_bytes(b'\n{"image": "1.png", "prompt": "caf\xe9"}\n')
        assert f"{table}, line 2 is not UTF-8 (byte 34)" in message(table)

    def test_a_line_over_one_megabyte(self, table: Path) -> None:
        start, end = b'{"image": "1.png", "prompt": "', b'"}\n'
        fits = start + b"x" * (1_000_000 - len(start) - len(end)) + end
        table.write_bytes(fits)
        assert len(read_calibration(table, ALL, seed=0).items) == 1
        table.write_bytes(b"\n" + fits[:-1] + b" \n")
        assert f"{table}, line 2 is longer than 1000000 bytes" in message(table)

    def test_a_file_too_large_to_hold_is_refused_unread(self, table: Path) -> None:
        os.truncate(table, 250_000_001)  # sparse: takes no room on the disk
        assert f"{table} is larger than 250000000 bytes" in message(table)

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_a_file_without_lines(self, table: Path, content: str) -> None:
        table.write_text(content)
        assert f"{table} holds no prompt" in message(table)

    @pytest.mark.parametrize(
        ("content", "finding"),
        [
            (b" \n", ": the prompt is empty"),
            (b"\xff\xfeW\0h\0", " is not UTF-8 (byte 1)"),
            (b"x" * 1_000_001, " is longer than 1000000 bytes"),
        ],
        ids=["empty", "UTF-16", "long"],
    )
    def test_a_prompt_file(self, pictures: Path, content: bytes, finding: str) -> None:
        (pictures / "c.txt").write_bytes(content)
        assert f"{pictures / 'c.txt'}{finding}" in message(pictures)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
    @given(st.lists(st.binary(max_size=20) | JSON.map(lambda value: json.dumps(value).encode()), max_size=3))
    def test_any_bytes_are_read_or_refused_in_one_line(self, table: Path, lines: list[bytes]) -> None:
        table.write_bytes(b"\n".join(lines))
        outcome = images_or_refusal(table)
        if isinstance(outcome, str):
            assert outcome.isprintable()
        else:
            assert all(path.resolve().is_relative_to(table.parent.resolve()) for path in outcome)


class TestPlaces:
    """No name leads out of the folder, and each message says which one tried."""

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        return picture(tmp_path / "secret.png")

    @pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "link.png", "sub/secret.png"])
    def test_a_name_leads_out(self, table: Path, secret: Path, name: str) -> None:
        (table.parent / "link.png").symlink_to(secret)
        (table.parent / "sub").symlink_to(secret.parent)
        write_lines(table, {"image": name, "prompt": "What?"})
        assert f"{table}, line 1: {name} leads out of the folder {table.parent}" in message(table)

    def test_an_absolute_name_leads_out(self, table: Path, secret: Path) -> None:
        write_lines(table, {"images": ["1.png", str(secret)], "prompt": "What?"})
        assert f"line 1: {secret} leads out of the folder" in message(table)

    @pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
    def test_a_link_in_a_folder_of_pictures_leads_out(self, pictures: Path, secret: Path, name: str) -> None:
        (pictures / name).unlink()
        (pictures / name).symlink_to(secret)
        assert f"{pictures}: {name} leads out of the folder" in message(pictures)

    def test_the_jsonl_file_of_a_folder_leads_out(self, table: Path, tmp_path: Path) -> None:
        table.rename(tmp_path / "outside.jsonl")
        table.symlink_to(tmp_path / "outside.jsonl")
        assert f"{table.parent}: ask.jsonl leads out of the folder" in message(table.parent)

    @pytest.mark.parametrize("name", ["gone.png", "sub", "1.png/x"])
    def test_a_name_leads_to_no_file(self, table: Path, name: str) -> None:
        (table.parent / "sub").mkdir()
        write_lines(table, {"image": "1.png", "prompt": "What?"}, {"image": name, "prompt": "What?"})
        assert f"{table}, line 2: {table.parent} has no file {name}" in message(table)

    @pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800", "loop"])
    def test_a_name_that_no_file_can_have(self, table: Path, name: str) -> None:
        (table.parent / "loop").symlink_to("loop")
        write_lines(table, {"image": name, "prompt": "What?"})
        assert f"{table}, line 1: " in message(table)

    def test_a_dangling_link_in_a_folder_of_pictures(self, pictures: Path) -> None:
        (pictures / "d.png").symlink_to("gone.png")
        assert f"{pictures} has no file d.png" in message(pictures)

    def test_a_path_that_does_not_exist(self, tmp_path: Path) -> None:
        assert f"{tmp_path / 'nowhere'} do not exist" in message(tmp_path / "nowhere")

    def test_a_picture_or_a_pipe_instead_of_a_jsonl_file(self, pictures: Path) -> None:
        os.mkfifo(pictures / "pipe.jsonl")
        for path in (pictures / "a.jpg", pictures / "pipe.jsonl"):
            assert f"{path} is no calibration data" in message(path)

    def test_a_folder_without_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "notes.md").write_text("hello")
        assert f"{tmp_path} holds neither a .jsonl file nor pictures" in message(tmp_path)

    def test_a_folder_with_two_jsonl_files(self, table: Path) -> None:
        shutil.copy(table, table.parent / "more.JSONL")
        assert "holds 2 .jsonl files (ask.jsonl, more.JSONL)" in message(table.parent)

    def test_a_file_that_cannot_be_read(self, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, *_: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
        assert message(table) == f"cannot read {table}: Permission denied; check the file and its permissions"
