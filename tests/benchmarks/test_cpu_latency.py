"""The CPU latency benchmark: what it builds, how it measures, and the report."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import latency_probe
import latency_process
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cpu_latency import Bench, app, check_memory, cmake_arguments, needed_disk, prompt_tokens
from export_cost import Steps
from latency_graph import LAST_LOGITS, write_last_logits
from latency_process import ContestantError
from latency_report import RATIOS, Contestant, Entry, Run, context_lines, print_table, ratios, report
from latency_worker import Ours, PlainOrt, Prompt
from onnx import TensorProto, helper
from rich.console import Console
from transformers import LlavaForConditionalGeneration

from qavp_export import pipeline
from qavp_export.cli.common import run_command
from qavp_export.engines import EngineOptions
from qavp_export.errors import BundleError, UnavailableError
from qavp_export.manifest import Manifest
from qavp_export.recipe import make_recipe


@pytest.fixture(scope="module")
def checkpoint_and_bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("float") / "bundle"
    recipe = make_recipe("none", {"keep": 1.0})
    pipeline.export(tiny_llava, recipe, folder, name="tiny", force=False, progress=lambda *_: None)
    write_last_logits(folder)
    return tiny_llava, folder


@pytest.mark.parametrize("engine", ["", "ort-reference"])
def test_contestants_answer_as_transformers(
    checkpoint_and_bundle: tuple[Path, Path], tmp_path: Path, engine: str
) -> None:
    checkpoint, bundle = checkpoint_and_bundle
    prompt = Prompt(Manifest.read(bundle), 13)
    assert len(prompt) == 25 + 13
    contestant: Ours | PlainOrt
    if engine:
        contestant = Ours(engine, bundle, prompt, 8, EngineOptions(threads=1))
    else:
        contestant = PlainOrt(bundle, prompt, 1, {}, tmp_path)
        operators = contestant.details()["decoder_operators"]
        assert operators["MatMul"] == 2 * 7 + 1
        assert operators["Attention"] == 2
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    ids, pixels = torch.from_numpy(prompt.ids), torch.from_numpy(prompt.pixels)
    # Beyond an end of sequence too, as the benchmark goes.
    expected = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=-1,
    )[0, len(prompt) :].tolist()
    # Twice: a second prompt must not see the first one's cache.
    for _ in range(2):
        token, ends = contestant.first_token()
        assert list(ends) == ["vision", "embed", "prefill"]
        assert sorted(ends.values()) == list(ends.values())
        tokens = [token]
        for _ in range(6):
            tokens.append(contestant.next_token(tokens[-1]))
        assert tokens == expected


def small_decoder(folder: Path, operator: str) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Neg", ["inputs_embeds"], ["hidden"]),
            helper.make_node(operator, ["hidden", "weight"], ["logits"]),
        ],
        "decoder",
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [helper.make_tensor("weight", TensorProto.FLOAT, [3, 3], range(9))],
    )
    (folder / "decoder").mkdir(parents=True)
    # ONNX Runtime may be older than onnx.
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 23)])
    onnx.save(model, folder / "decoder" / "model.onnx")


def test_logits_of_the_last_token_alone(tmp_path: Path) -> None:
    small_decoder(tmp_path, "MatMul")
    write_last_logits(tmp_path)
    session = ort.InferenceSession(tmp_path / LAST_LOGITS)
    values = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    (logits,) = session.run(None, {"inputs_embeds": values})
    # Small integers: exact.
    assert np.array_equal(logits, -values[:, 4:] @ np.arange(9, dtype=np.float32).reshape(3, 3))


def test_a_head_that_is_no_matmul_is_refused(tmp_path: Path) -> None:
    small_decoder(tmp_path, "Add")
    with pytest.raises(BundleError, match="do not come from a MatMul"):
        write_last_logits(tmp_path)


# The runs that count end 1021 and 2037.5 s after the first.
@pytest.mark.parametrize(("repeats", "seconds"), [(2, 0), (1, 1022), (2, 1)])
def test_the_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch, repeats: int, seconds: float) -> None:
    now = 0.0

    class Fake:
        runs = 0

        def first_token(self) -> tuple[int, dict[str, float]]:
            nonlocal now
            self.runs += 1
            # The first run takes 100 times as long, as cold ones do.
            scale = 100 if self.runs == 1 else self.runs
            ends = {}
            for name, step in (("vision", 2), ("embed", 0.5), ("prefill", 3)):
                now += step * scale
                ends[name] = now
            return 5, ends

        def next_token(self, token: int) -> int:
            nonlocal now
            # The median of 1, 2, ... 5 is not their mean: the last takes much longer.
            now += (token - 4) if token < 9 else 1000
            return token + 1

    monkeypatch.setattr("latency_probe.time.perf_counter", lambda: now)
    assert latency_probe.measure(Fake(), repeats, seconds, 5) == {
        "vision": [4, 6],
        "prefill": [6, 9],
        "ttft": [11, 16.5],
        "tpot": [3, 3],
    }


def test_memory_of_a_process() -> None:
    before = latency_probe.resident()
    block = np.ones(2**27, np.uint8)
    after = latency_probe.resident()
    # Other things come and go meanwhile, and are much smaller.
    assert after["anonymous"] - before["anonymous"] == pytest.approx(block.nbytes, rel=0.1)
    assert after["peak"] >= after["anonymous"] + after["file_backed"] - 2**20
    assert after["file_backed"] > 2**20


def test_a_process_answers_and_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    memory = iter([{"anonymous": 5, "peak": 7}, {"anonymous": 9, "peak": 9}, {"anonymous": 2, "peak": 11}])

    def resident(_: int) -> dict[str, int]:
        found = next(memory, None)
        if found is None:
            seen.touch()
        return found or {"anonymous": 1, "peak": 1}

    monkeypatch.setattr(latency_process, "resident", resident)
    monkeypatch.setattr(latency_process, "_INTERVAL_S", 0.001)
    program = "import os, sys\nwhile not os.path.exists(sys.argv[1]): pass\nprint('hello\\n{\"a\": 3}')"
    answer, peak = latency_process.run([sys.executable, "-c", program, seen])
    assert answer == {"a": 3}
    assert peak == {"peak_rss_bytes": 11, "peak_anonymous_bytes": 9}


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("raise ValueError('no good')", ContestantError, "ValueError: no good"),
        ("raise SystemExit(4)", ContestantError, "ended with exit code 4 and no message"),
        ("raise MemoryError", UnavailableError, "the machine ran out of memory: MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", UnavailableError, "the machine ran out of memory"),
    ],
)
def test_a_failed_process_is_one_line(program: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        latency_process.run([sys.executable, "-c", program])
    assert "\n" not in str(caught.value)


def entry(tokens: int, *scales: float, vision: float | None = 2.0) -> Entry:
    """Returns an entry with one run for each scale, in which everything takes that many times as long."""
    base = {"vision": [] if vision is None else [vision], "prefill": [8.0], "ttft": [10.0], "tpot": [0.05]}
    runs = [
        Run(
            load_s=scale,
            timings={name: [value * scale for value in values] for name, values in base.items()},
            peak_rss_bytes=int(scale * 2**30),
            peak_anonymous_bytes=int(scale * 2**29),
            resident_after_load={"anonymous": 1, "file_backed": 2, "peak": 3},
            details={},
        )
        for scale in scales
    ]
    return Entry(tokens, 3_000_000_000, runs)


@pytest.fixture
def entries() -> dict[Contestant, Entry]:
    return {
        Contestant.OURS: entry(136, 1.5, 0.5, 1.0),
        Contestant.FP32: entry(640, 20.0, 24.0),
        Contestant.NBITS: replace(entry(640, 1.0), skipped="too big"),
        Contestant.LLAMA: entry(640, 3.0, vision=None),
    }


def test_ratios_are_of_medians(entries: dict[Contestant, Entry]) -> None:
    found = json.loads(json.dumps(report({"llava-1b": entries}, "llava-1b", {"threads": 2})))
    assert found["ratios"] == {
        "prefill_vs_ort_fp32": 22.0,
        "prefill_vs_ort_nbits": None,
        "prefill_vs_llamacpp": 3.0,
        "ttft_vs_ort_fp32": 22.0,
        "tpot_vs_llamacpp": pytest.approx(3.0),
    }
    contestants = found["shapes"]["llava-1b"]["contestants"]
    ours, llama = contestants["ours"], contestants["llamacpp"]
    assert (ours["prefill_s"], ours["ttft_s"], ours["vision_s"], ours["load_s"]) == (8.0, 10.0, 2.0, 1.0)
    assert (ours["peak_rss_bytes"], ours["peak_anonymous_bytes"]) == (1.5 * 2**30, 1.5 * 2**29)
    assert llama["vision_s"] is None
    assert contestants["ort-nbits"]["skipped"] == "too big"
    assert "prefill_s" not in contestants["ort-nbits"]
    assert found["threads"] == 2


def test_nothing_to_compare_with_is_no_ratio(entries: dict[Contestant, Entry]) -> None:
    del entries[Contestant.OURS]
    assert ratios(entries) == dict.fromkeys(RATIOS)


def test_table(entries: dict[Contestant, Entry], capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"llava-1b": entries}, Console(width=170), ["built so"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "built so"
    assert "(a) ours, keep 0.125 llava-1b 136 3 2.000 8.000 10.0 50.0 1.000 1.50 (0.75) 3.00" in lines
    assert "(e) llama.cpp Q4_0, dense llava-1b 640 1 24.0 30.0 150.0 3.000 3.00 (1.50) 3.00" in lines
    assert "(d) ONNX Runtime MatMulNBits, dense llava-1b 640 skipped" in lines
    assert "(a) faster than (c) ONNX Runtime fp32, dense llava-1b 640 22.00 x 22.00 x 22.00 x 22.00 x" in lines
    # llama.cpp has no tower: no TTFT to compare.
    assert "(a) faster than (e) llama.cpp Q4_0, dense llava-1b 640 3.00 x 3.00 x" in lines
    assert lines[-1] == "(d) ONNX Runtime MatMulNBits, dense, llava-1b: too big"


def test_rounds_run_in_opposite_order_and_go_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [Contestant.OURS, Contestant.DENSE, Contestant.FP32, Contestant.NBITS, Contestant.LLAMA]
    asked: list[str] = []

    def fake_run(command: list[str]) -> tuple[dict[str, object], dict[str, int]]:
        task = json.loads(command[-1])
        assert task["kv_cache"] == "int8"
        name = Path(task["bundle"]).name.removeprefix("llava-1.5-7b-")
        asked.append(name)
        if name == "ours-dense":
            raise ContestantError("no good")
        timings = {"vision": [1.0], "prefill": [2.0], "ttft": [3.0], "tpot": [4.0]}
        answer = {"load_s": 1.0, "timings": timings, "resident_after_load": {}, "details": {}}
        return answer, {"peak_rss_bytes": 2, "peak_anonymous_bytes": 1}

    for name in names:
        (tmp_path / f"llava-1.5-7b-{name}").mkdir()
    monkeypatch.setattr("cpu_latency.run", fake_run)
    monkeypatch.setattr("cpu_latency.write_last_logits", lambda _: None)
    monkeypatch.setattr("cpu_latency.Manifest.read", lambda _: None)
    monkeypatch.setattr("cpu_latency.available_memory", lambda: 24 * 10**9)
    bench = Bench(tmp_path, 1, 1, 0.0, "int8", UnavailableError("no compiler"), Steps(Console(quiet=True), 0.0))
    entries = bench.measure("llava-1.5-7b", names)
    assert asked == ["ours", "ours-dense", "ort-nbits", "ort-nbits", "ours"]
    assert [len(entries[name].runs) for name in names] == [2, 0, 0, 2, 0]
    assert [entries[name].failed for name in names] == [False, True, False, False, False]
    reasons = [entries[name].skipped for name in names]
    assert (reasons[0], reasons[1], reasons[3], reasons[4]) == ("", "no good", "", "no compiler")
    assert "28 GB of memory" in reasons[2]


def test_a_bundle_of_another_version_is_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake_run(command: list[str]) -> tuple[dict[str, object], dict[str, int]]:
        commands.append(command)
        raise ContestantError("stop here")

    bundle = tmp_path / "llava-1b-ours-dense"
    bundle.mkdir()
    (bundle / "qavp.json").write_text('{"schema_version": 1}', encoding="utf-8")
    (tmp_path / "llava-1b").mkdir()
    monkeypatch.setattr("cpu_latency.run", fake_run)
    bench = Bench(tmp_path, 1, 1, 0.0, None, None, Steps(Console(quiet=True), 0.0))
    bench.measure("llava-1b", [Contestant.DENSE])
    # The exporter refuses a folder that exists.
    assert not bundle.exists()
    ((_, *arguments),) = commands
    assert arguments == ["--model", str(tmp_path / "llava-1b"), "-o", str(bundle), "--json", "--keep", "1.0"]


def test_tokens_of_the_prompts() -> None:
    assert [prompt_tokens(name) for name in Contestant] == [136, 640, 640, 640, 640, 136]


def test_what_does_not_fit_is_refused() -> None:
    # 7e9 parameters in float32 are 28 GB.
    with pytest.raises(UnavailableError, match=r"needs about 28 GB of memory, 24 GB are available"):
        check_memory("llava-1.5-7b", Contestant.FP32, 24_000_000_000)
    check_memory("llava-1.5-7b", Contestant.OURS, 24_000_000_000)
    check_memory("llava-1b", Contestant.FP32, 24_000_000_000)


def test_disk_is_needed_for_what_is_missing(tmp_path: Path) -> None:
    # A checkpoint of 1.4e9 float16 values, a float bundle as large, and a GGUF of 5 bits for each value.
    memory = 24 * 10**9
    names = [Contestant.FP32, Contestant.LLAMA, Contestant.LLAMA_SHORT]
    everything = needed_disk(tmp_path, ["llava-1b"], names, memory)
    assert everything == pytest.approx(2.8e9 + 2.8e9 + 0.9e9, rel=0.05)
    (tmp_path / "llava-1b-ort-fp32").mkdir()
    assert needed_disk(tmp_path, ["llava-1b"], [Contestant.FP32], memory) == 0
    # Nothing is exported for what the memory cannot hold.
    assert needed_disk(tmp_path, ["llava-1.5-7b"], [Contestant.FP32], memory) == 0


def test_too_small_a_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export_cost.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    assert run_command(app, "cpu_latency", ["--work", str(tmp_path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 GB are free" in line


@pytest.mark.parametrize("flag", ["--only=genai", "--repeats=0", "--seconds=-1", "--llama-wheel=missing.whl"])
def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert run_command(app, "cpu_latency", [flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag.partition("=")[0] in line


@pytest.mark.parametrize(
    ("flags", "amx"), [("flags : sse2 avx512_vnni", False), ("flags\t: fma amx_tile amx_int8\n", True)]
)
def test_llama_is_built_without_amx(flags: str, amx: bool) -> None:
    arguments = cmake_arguments(flags).split()
    assert arguments[0] == "-DGGML_NATIVE=ON"
    assert ("-DGGML_AMX_INT8=OFF" in arguments) == amx
    assert ("-DCMAKE_CXX_FLAGS=-mno-amx-int8" in arguments) == amx
    assert ("-DCMAKE_C_FLAGS=-mno-amx-int8" in arguments) == amx


def test_what_a_token_costs_behind_a_long_context() -> None:
    entry = Entry(prompt_tokens=136)
    for short, long in ((0.020, 0.026), (0.018, 0.024), (0.040, 0.025)):
        details = {"tpot_s_by_context": {"100": short, "2000": long}}
        entry.runs.append(Run(1.0, {}, 0, 0, {}, details))
    assert context_lines(entry) == ["TPOT behind 2000 tokens 25.0 ms, 1.25 x that behind 100"]
    assert context_lines(Entry(prompt_tokens=640)) == []
