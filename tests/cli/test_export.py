"""qavp-export as a user runs it: every bad input is one line, the right exit code, and no partial output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qavp_export.cli.common import run_command
from qavp_export.cli.export import app
from qavp_export.cli.run import main as qavp_run
from tests.models.tiny import TinySpec, make_llava

# As transformers stores it.
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


def _run(*argv: str) -> int:
    return run_command(app, "qavp-export", list(argv))


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        (config[section] if section else config)[field] = value
    path.write_text(json.dumps(config))


def _edit_tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, path, metadata={"format": "pt"})


def _poison(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[3, 5] = value
        return array

    return change


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(folder: Path, file: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "missing shard": (lambda folder: _index(folder, "model-00009-of-00009.safetensors"), [], "model-00009-of-00009"),
    "index outside the folder": (lambda folder: _index(folder, "../x.safetensors"), [], "../x.safetensors"),
    "truncated": (_truncate, [], "truncated"),
    "pickle only": (_only_pickle, [], "safetensors"),
    "missing tensor": (
        lambda folder: _edit_tensor(folder, Q_PROJ, lambda _: None),
        [],
        "layers.0.self_attn.q_proj.weight",
    ),
    "wrong shape": (lambda folder: _edit_tensor(folder, Q_PROJ, lambda array: array[:-1]), [], Q_PROJ),
    "wrong dtype": (lambda folder: _edit_tensor(folder, Q_PROJ, lambda array: array.astype(np.int32)), [], Q_PROJ),
    "NaN": (lambda folder: _edit_tensor(folder, Q_PROJ, _poison(np.nan)), [], Q_PROJ),
    "infinity": (lambda folder: _edit_tensor(folder, Q_PROJ, _poison(-np.inf)), [], Q_PROJ),
    "unknown family": (lambda folder: _edit_config(folder, model_type="blip-9"), [], "supported: gemma3, idefics3"),
    "no model type": (lambda folder: _edit_config(folder, model_type=None), [], "supported: gemma3, idefics3"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), [], "config.json"),
    "nonsense in config": (lambda folder: _edit_config(folder, text_config__hidden_size="big"), [], "config.json"),
    "unknown feature selection": (
        lambda folder: _edit_config(folder, vision_feature_select_strategy="half"),
        [],
        "config.json is not valid",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), [], "the tokenizer cannot be loaded"),
    "no image processor": (
        lambda folder: (folder / "processor_config.json").unlink(),
        [],
        "the image processor cannot be loaded",
    ),
    "no usable group size": (lambda folder: _edit_config(folder, text_config__intermediate_size=100), [], "group size"),
    "keep of zero": (lambda _: None, ["--keep", "0"], "keep = 0.0"),
    "keep above one": (lambda _: None, ["--keep", "1.5"], "keep = 1.5"),
    "keep that is no number": (lambda _: None, ["--keep", "most"], "--keep 'most' is neither a fraction, like 0.125"),
    "keep of three numbers": (lambda _: None, ["--keep", "0.1:0.2:0.3"], "nor a range, like 0.05:0.5"),
    "keep range that descends": (lambda _: None, ["--keep", "0.5:0.05"], "keep_range = (0.5, 0.05) is not valid"),
    "unknown scorer": (lambda _: None, ["--semantic", "vibes"], "semantic = 'vibes'"),
    "alpha that is no number": (lambda _: None, ["--alpha", "best"], "give a number in [0, 1], or auto"),
    "outlier weight above one": (lambda _: None, ["--outlier-weight", "1.5"], "outlier_weight = 1.5"),
    "weights of scores that are ignored": (
        lambda _: None,
        ["--alpha", "auto", "--select", "maxmin"],
        "alpha auto weighs scores, and select maxmin ignores them",
    ),
    "unknown recipe": (lambda _: None, ["--recipe", "magic"], "choose one of rtn, rotate"),
    "recipe file that is not there": (
        lambda _: None,
        ["--recipe", "no/such.yaml"],
        "recipe no/such.yaml cannot be read",
    ),
    "precision without a pattern": (lambda _: None, ["--keep-precision", "w8a8"], "is not PATTERN=PRECISION"),
    "unknown precision": (lambda _: None, ["--keep-precision", "lm_head=w2a2"], "keep_precision.lm_head = 'w2a2'"),
    "pattern that matches nothing": (
        lambda _: None,
        ["--keep-precision", "layers.9.*=w8a8"],
        "keep_precision 'layers.9.*' matches no linear layer of the decoder",
    ),
    "calibration that no one reads": (
        lambda _: None,
        ["--calibration", "."],
        "recipe rotate reads no calibration data",
    ),
    "calibration that is not there": (
        lambda _: None,
        ["--recipe", "gptq", "--calibration", "no/such"],
        "calibration data no/such do not exist",
    ),
    "size budget above one": (lambda _: None, ["--recipe", "auto", "--size-budget", "2"], "size_budget = 2.0"),
    "GPTQ in NVFP4": (
        lambda _: None,
        ["--recipe", "gptq", "--format", "nvfp4"],
        "format nvfp4 goes with decoder w4a4, no GPTQ",
    ),
    "group size that does not fit": (lambda _: None, ["--group-size", "128"], "group_size 128 does not divide"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    break_it, flags, expected = BAD_CHECKPOINTS[case]
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    break_it(model)
    out = tmp_path / "out"
    out.mkdir()
    assert _run("--model", str(model), "-o", str(out / "bundle"), "--json", *flags) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert list(out.iterdir()) == []


def test_wrong_weights_are_found_before_tracing_where_headers_tell(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reading(*_: object) -> NoReturn:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("qavp_export.checkpoint.Checkpoint.read", no_reading)
    assert _run("--model", str(tiny_llava), "--dry-run") == 0
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    _edit_tensor(model, Q_PROJ, lambda array: array[:-1])
    assert _run("--model", str(model), "-o", str(tmp_path / "bundle"), "--json") == 2


def test_existing_output_needs_force(tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("text")
    assert _run("--model", str(tiny_llava), "-o", str(tmp_path / "bundle")) == 2
    assert "--force" in capfd.readouterr().err
    assert _run("--model", str(tiny_llava), "-o", str(tmp_path / "bundle"), "--force") == 2
    assert "not a bundle" in capfd.readouterr().err
    assert (tmp_path / "bundle" / "precious").read_text() == "text"


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_model: ir.Model, path: Path, **_: object) -> NoReturn:
        path.write_bytes(b"half a graph")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qavp_export.bundle.ir.save", full)
    assert _run("--model", str(tiny_llava), "-o", str(tmp_path / "out" / "bundle"), "--json") == 1
    assert "no space left" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, tiny_llava: Path, number: int, code: int) -> None:
    # Where the tests run in the background, a shell may have had SIGINT ignored, and children inherit that.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = f"{listen}from qavp_export.cli.export import main; raise SystemExit(main())"
    argv = ["--model", str(tiny_llava), "-o", str(tmp_path / "bundle")]
    with subprocess.Popen([sys.executable, "-c", command, *argv], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        # The temporary folder appears when the work has begun.
        while not list(tmp_path.glob(".bundle.partial")) and process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError("the export did not begin")
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert stderr.strip().splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []


def test_json_summary_is_one_object(tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    assert _run("--model", str(tiny_llava), "--keep", "0.125", "-o", str(bundle), "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["vision_tokens"] == {"before": 25, "after": 3}
    assert facts["decoder_linears"] == {"w4a4": 14, "w8a16": 1}
    assert facts["parity"]["verdict"] == "PASS"
    assert facts["bundle_bytes"] == sum(
        path.stat().st_size for path in bundle.rglob("*") if path.is_file() and path.name != "qavp.json"
    )
    assert _run("--verify", str(bundle), "--json") == 0
    assert json.loads(capfd.readouterr().out)["valid"] is True
    with (bundle / "decoder" / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    assert _run("--verify", str(bundle)) == 2
    assert "model.onnx.data was changed after the export" in capfd.readouterr().err


def test_the_summary_for_people_names_what_matters(
    tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run("--model", str(tiny_llava), "-o", str(tmp_path / "bundle")) == 0
    out = " ".join(capfd.readouterr().out.split())
    for words in ("25 -> 3 per image", "14 at w4a4, 1 at w8a16", "PASS", "qavp-run"):
        assert words in out


def test_dry_run_prints_the_plan_from_config_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_llava(tmp_path / "model", TinySpec())
    stored = (model / "model.safetensors").stat().st_size
    (model / "model.safetensors").unlink()
    assert _run("--model", str(model), "--dry-run", "--json") == 0
    plan = json.loads(capfd.readouterr().out)
    assert (plan["vision_tokens_before"], plan["vision_tokens_after"]) == (25, 3)
    assert (plan["linears"], plan["group_size"], plan["decoder_layers"]) == ({"w4a4": 14, "w8a16": 1}, 32, 2)
    # The file is the tensors and a header.
    assert 0 < stored - plan["checkpoint_bytes"] < 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_dry_run_of_a_range_says_what_a_call_may_choose(tiny_llava: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("--model", str(tiny_llava), "--dry-run", "--keep", "0.05:0.5") == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "25 -> 0.05 to 0.5 of them as each call asks, 0.125 unless it does" in out
    assert _run("--model", str(tiny_llava), "--dry-run", "--json", "--keep", "0.2:0.5") == 0
    plan = json.loads(capfd.readouterr().out)
    assert (plan["vision_tokens_before"], plan["vision_tokens_after"]) == (25, None)
    assert (plan["keep"], plan["keep_range"]) == (0.2, [0.2, 0.5])


def test_dry_run_predicts_the_size_of_the_bundle(
    tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run("--model", str(tiny_llava), "--dry-run", "--json") == 0
    plan = json.loads(capfd.readouterr().out)
    assert _run("--model", str(tiny_llava), "-o", str(tmp_path / "bundle"), "--json") == 0
    capfd.readouterr()
    data = sum(path.stat().st_size for path in (tmp_path / "bundle").glob("*/model.onnx.data"))
    # Beside the weights the estimate counts layers that the vision encoder does not need (the last of the tower).
    assert data == pytest.approx(plan["bundle_bytes"], rel=0.15)


def test_gptq_and_alpha_auto_on_the_users_prompts(
    tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "photos"
    data.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(data / f"{number}.png")
    (data / "1.txt").write_text("what is left ?")
    flags = ["--recipe", "auto", "--size-budget", "0.2", "--calibration", str(data), "--calibration-samples", "2"]
    flags += ["--alpha", "auto"]
    assert _run("--model", str(tiny_llava), "-o", str(tmp_path / "bundle"), "--json", *flags) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["parity"]["verdict"] == "PASS"
    assert (facts["calibration"]["data"], facts["calibration"]["prompts"]) == ("photos", 2)
    assert len(facts["calibration"]["sensitivity"]) == 14
    fit = facts["alpha_fit"]
    assert (fit["images"], len(fit["candidates"])) == (2, 13)
    assert fit["chosen"] == {name: facts["recipe"][name] for name in ("alpha", "outlier_weight")}
    assert facts["decoder_linears"]["w8a8"] >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "photos"]
    assert not list((tmp_path / "bundle").glob("scratch*"))


def test_nvfp4_is_checked_and_refused_where_it_cannot_run(
    tmp_path: Path, tiny_llava: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    assert _run("--model", str(tiny_llava), "-o", str(bundle), "--format", "nvfp4", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["decoder_linears"] == {"nvfp4": 14, "w8a16": 1}
    assert facts["parity"]["verdict"] == "DECODER NOT RUN"
    assert "14 FP4 weights equal the reference bit for bit" in facts["parity"]["reason"]
    assert _run("--verify", str(bundle)) == 0
    assert qavp_run([str(bundle), "--prompt", "what"]) == 3
    assert "is in NVFP4, which ONNX Runtime" in capfd.readouterr().err


def test_list_recipes_documents_every_field(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("--list-recipes", "--json") == 0
    listed = json.loads(capfd.readouterr().out)
    assert list(listed["recipes"]) == ["rtn", "rotate", "gptq", "auto", "w4a8", "w4a16", "w8a8", "nvfp4", "none"]
    assert listed["default"] == "rotate"
    assert all(recipe["description"] for recipe in listed["recipes"].values())
    assert all(field["meaning"] for field in listed["fields"].values())
    assert _run("--list-recipes") == 0
    first_words = {line.split()[0] for line in capfd.readouterr().out.splitlines() if line.strip()}
    assert {*listed["recipes"], *listed["fields"]} <= first_words


def test_list_models_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("--list-models", "--json") == 0
    listed = json.loads(capfd.readouterr().out)
    assert listed["families"]["llava"]["scorers"] == ["cls", "received", "norm", "random", "text"]
    assert listed["short_names"]["llava-1.5-7b"] == "llava-hf/llava-1.5-7b-hf"
    assert _run("--list-models") == 0
    assert "llava-1.5-13b" in capfd.readouterr().out
    assert _run("--version") == 0
    assert capfd.readouterr().out.strip() == "0.1.0"


def test_help_has_an_example_and_a_missing_model_is_a_usage_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("--help") == 0
    assert "qavp-export --model llava-1.5-7b --keep 0.125" in " ".join(capfd.readouterr().out.split())
    assert _run() == 2
    assert "--model is missing" in capfd.readouterr().err
    assert _run("--keep", "much") == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
