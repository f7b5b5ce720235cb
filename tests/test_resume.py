"""An interrupted export goes on where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from qavp_export import pipeline
from qavp_export.bundle import BundleWriter
from qavp_export.calibration import gptq, sink
from qavp_export.checkpoint import Checkpoint
from qavp_export.errors import InputError
from qavp_export.recipe import make_recipe
from tests.test_bundle import leftovers, manifest

FIELDS = {"calibration_samples": 2}


def _export(model: Path, target: Path, recipe: str, stop: tuple[str, int] | None = None, **options: bool) -> None:
    def progress(stage: str, done: int, _total: int) -> None:
        if stop is not None and (stage, done) == stop:
            raise KeyboardInterrupt

    fields = FIELDS if make_recipe(recipe, {}).needs_calibration else {}
    pipeline.export(model, make_recipe(recipe, fields), target, name="model", force=False, progress=progress, **options)


def _contents(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    found = {}
    for recipe in ("rotate", "auto"):
        target = tmp_path_factory.mktemp(recipe) / "bundle"
        _export(tiny_llava, target, recipe)
        found[recipe] = _contents(target)
    return found


@pytest.mark.parametrize(
    ("recipe", "stops"),
    [
        ("rotate", [("write vision_encoder", 3), ("round for the attention sink", 7), ("write decoder", 30)]),
        ("auto", [("embed calibration prompts", 1), ("GPTQ", 4), ("GPTQ", 11), ("finish", 0)]),
    ],
)
def test_a_resumed_export_is_the_same_byte_by_byte(
    tmp_path: Path,
    tiny_llava: Path,
    uninterrupted: dict[str, dict[str, bytes]],
    recipe: str,
    stops: list[tuple[str, int]],
) -> None:
    target = tmp_path / "bundle"
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            _export(tiny_llava, target, recipe, stop, resume=True)
        # Nothing that could be taken for a bundle.
        assert [path.name for path in tmp_path.iterdir()] == [".bundle.partial"]
    _export(tiny_llava, target, recipe, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert _contents(target) == uninterrupted[recipe]


@pytest.mark.parametrize(
    ("recipe", "stop", "inputs"),
    [
        # Of 8 inputs (q/k/v, o, gate/up, down in each of two layers) those of the second layer are left.
        ("rotate", ("round for the attention sink", 7), 4),
        ("gptq", ("GPTQ", 7), 4),
    ],
)
def test_finished_weights_are_not_rounded_again(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, stop: tuple[str, int], inputs: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _export(tiny_llava, tmp_path / "bundle", recipe, stop, resume=True)
    rounded: list[int] = []
    read: list[str] = []
    module, name = (sink, "SinkRounding") if recipe == "rotate" else (gptq, "gptq_two_level")
    original, read_checked = getattr(module, name), Checkpoint.read_checked

    def count(*args: object, **kwargs: object) -> object:
        rounded.append(1)
        return original(*args, **kwargs)

    def record(self: Checkpoint, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
        read.append(tensor)
        return read_checked(self, tensor, shape)

    monkeypatch.setattr(module, name, count)
    monkeypatch.setattr(Checkpoint, "read_checked", record)
    monkeypatch.setattr(pipeline, "check_parity", _no_parity)
    _export(tiny_llava, tmp_path / "bundle", recipe, resume=True)
    assert len(rounded) == inputs
    # What the vision encoder and the first layer were made of is not even read.
    assert not [tensor for tensor in read if "vision_tower" in tensor or "layers.0.self_attn.q" in tensor]


class _Passed:
    verdict = "PASS"

    def to_dict(self) -> dict[str, str]:
        return {"verdict": self.verdict}


def _no_parity(*_: object) -> _Passed:
    return _Passed()


@pytest.mark.parametrize(("number", "flags"), [(signal.SIGKILL, []), (signal.SIGINT, ["--resume"])])
def test_a_killed_run_is_resumed(
    tmp_path: Path,
    tiny_llava: Path,
    shared_folder: Path,
    uninterrupted: dict[str, dict[str, bytes]],
    number: int,
    flags: list[str],
) -> None:
    journal = tmp_path / ".bundle.partial" / "work" / "journal"
    # Where the tests run in the background, a shell may have had SIGINT ignored, and children inherit that.
    run = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from tests.models.traces import traced_once\n"
        "from qavp_export.cli.export import main\n"
        f"with traced_once(Path({str(shared_folder)!r})): raise SystemExit(main())"
    )
    command = [sys.executable, "-c", run, "--model", str(tiny_llava), "-o", str(tmp_path / "bundle"), *flags]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=root) as process:
        # As soon as a rounded weight is there.
        while not (journal.is_file() and b".codes" in journal.read_bytes()):
            assert process.poll() is None
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    if flags:
        assert stderr.splitlines()[-2:] == [
            "what is finished is kept; run the same command again to go on",
            "interrupted",
        ]
    assert not (tmp_path / "bundle").exists()
    _export(tiny_llava, tmp_path / "bundle", "rotate", resume=True)
    ours = _contents(tmp_path / "bundle")
    # The manifest names the model as the user did.
    assert {k: v for k, v in ours.items() if k != "qavp.json"} == {
        k: v for k, v in uninterrupted["rotate"].items() if k != "qavp.json"
    }


def test_what_is_left_of_another_export_is_not_resumed(tmp_path: Path, tiny_llava: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        _export(tiny_llava, target, "rotate", ("write decoder", 0), resume=True)
    with pytest.raises(InputError, match=r"bundle\.partial is left of an interrupted export with another recipe"):
        _export(tiny_llava, target, "rtn", resume=True)
    # And it is still there for the export that it belongs to.
    assert (tmp_path / ".bundle.partial" / "decoder").is_dir()
    _export(tiny_llava, target, "rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_two_exports_to_one_place_at_once(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle", force=False) as first:
        (first.folder / "half").write_text("half")
        with pytest.raises(InputError, match="another qavp-export is writing"):
            BundleWriter(tmp_path / "bundle", force=False).__enter__()
        assert (first.folder / "half").is_file()
        first.commit(manifest())
    assert leftovers(tmp_path) == []
