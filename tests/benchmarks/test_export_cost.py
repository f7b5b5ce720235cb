"""The export cost benchmark: the model builder's input, and the report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cost_report import Run, Tool, print_table, report
from export_cost import app, command_line
from llama_decoder import extract_decoder
from process_cost import Cost
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from qavp_export.cli.common import run_command


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(3)
    text = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49, dtype="float16")
    model = LlavaForConditionalGeneration(config).half()
    model.save_pretrained(folder, max_shard_size="10KB")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(50)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def test_the_decoder_is_the_language_model(llava: Path, tmp_path: Path) -> None:
    extract_decoder(llava, tmp_path / "decoder")
    full = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float16)
    decoder, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert type(decoder).__name__ == "LlamaForCausalLM"
    assert not any(loading.values())
    expected = {f"model.{name}": value for name, value in full.model.language_model.state_dict().items()}
    expected["lm_head.weight"] = full.lm_head.weight
    found = decoder.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float16
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("body", "head"),
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
)
def test_bytes_are_copied_as_they_are(llava: Path, tmp_path: Path, body: str, head: str) -> None:
    generator = torch.Generator().manual_seed(4)
    decoder = {
        "model.embed_tokens.weight": torch.randn(5, 3, generator=generator).half(),
        "model.layers.10.mlp.up_proj.weight": torch.randn(7, 3, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(3, generator=generator),
        "lm_head.weight": torch.randn(5, 3, generator=generator).half(),
    }
    stored = {
        name.replace("lm_head.", head) if name.startswith("lm_head.") else body + name.removeprefix("model."): value
        for name, value in decoder.items()
    }
    vision = {"model.vision_tower.weight": torch.ones(2), "multi_modal_projector.linear_1.bias": torch.ones(3)}
    save_file(stored | vision, tmp_path / "model.safetensors")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llava / file, tmp_path)
    extract_decoder(tmp_path, tmp_path / "decoder")
    copied = load_file(tmp_path / "decoder" / "model.safetensors")
    assert set(copied) == set(decoder)
    for name, value in decoder.items():
        assert copied[name].dtype == value.dtype
        assert torch.equal(copied[name], value)


def run(tool: Tool, model: str, scale: int, **cost: object) -> Run:
    """Returns a run of which everything is `scale` times as much as of another."""
    fake = Cost(
        exit_code=0,
        over_limit=False,
        wall_s=10.0 * scale,
        cpu_s=15.0 * scale,
        peak_rss_bytes=2**30,
        samples=7,
        bytes_read=3_000_000_000 * scale,
        bytes_written=2_000_000_000 * scale,
        disk_read_bytes=1,
        disk_written_bytes=2,
    )
    return Run(
        tool=tool,
        model=model,
        command=["export"],
        parameters=10**9 * scale,
        input_bytes=2 * 10**9 * scale,
        output_bytes=10**9 * scale,
        limit_bytes=8 * 2**30,
        cost=replace(fake, **cost),
    )


def test_report() -> None:
    runs = [
        run(Tool.OURS, "llava-1b", 1),
        run(Tool.BUILDER, "llava-1b", 2),
        run(Tool.OURS, "llava-1.5-7b", 7),
        run(Tool.BUILDER, "llava-1.5-7b", 7, over_limit=True, exit_code=-9),
    ]
    found = json.loads(json.dumps(report(runs, "llava-1.5-7b", {"layers": None})))
    assert (found["wall_s"], found["peak_rss_bytes"]) == (70.0, 2**30)
    assert [entry["outcome"] for entry in found["runs"]] == ["done", "done", "done", "out of memory"]
    assert found["runs"][2]["read_per_input"] == 1.5
    assert found["runs"][2]["written_per_output"] == 2.0
    growth = {
        "parameters": 7,
        "wall_s": 7,
        "cpu_s": 7,
        "peak_rss_bytes": 1,
        "bytes_read": 7,
        "bytes_written": 7,
        "output_bytes": 7,
    }
    # The builder did not get through the large one: there is nothing to compare.
    assert found["growth"] == {"ours": growth}
    half = {
        "wall_s": 0.5,
        "cpu_s": 0.5,
        "peak_rss_bytes": 1,
        "bytes_read": 0.5,
        "bytes_written": 0.5,
        "output_bytes": 0.5,
    }
    assert found["ours_per_builder"] == {"llava-1b": half}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    failed = replace(run(Tool.BUILDER, "llava-1b", 2, exit_code=1), last_line="RuntimeError: no", output_bytes=0)
    runs = [run(Tool.OURS, "llava-1b", 1), failed, run(Tool.BUILDER, "llava-1.5-7b", 7, over_limit=True)]
    print_table(runs, "llava-1.5-7b", Console(width=160))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["qavp-export", "llava-1b", "1.00", "B", "10", "15", "1.00", "3.00", "2.00", "1.00", "1.50", "2.00"] in lines
    assert ["GenAI", "model", "builder", "llava-1b", "2.00", "B", "failed"] in lines
    assert ["GenAI", "model", "builder", "llava-1.5-7b", "7.00", "B", "out", "of", "memory", "limit", "8.0"] in lines


@pytest.mark.parametrize(
    ("cost", "last_line", "outcome"),
    [
        ({"exit_code": 1}, "RuntimeError: not supported", "failed"),
        ({"exit_code": 1}, "MemoryError", "out of memory"),
        ({"exit_code": 1}, "DefaultCPUAllocator: can't allocate memory: you tried 1 bytes", "out of memory"),
        ({"exit_code": -9}, "", "out of memory"),
        ({"exit_code": -15}, "", "failed"),
    ],
)
def test_outcome(cost: dict[str, int], last_line: str, outcome: str) -> None:
    assert replace(run(Tool.OURS, "llava-1b", 1, **cost), last_line=last_line).outcome == outcome


def test_an_unknown_shape_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app, "export_cost", ["--shape", "llava-9b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "llava-9b" in line
    assert "llava-1.5-7b" in line


def test_too_small_a_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export_cost.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    assert run_command(app, "export_cost", ["--work", str(tmp_path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 GB are free" in line


def test_command_lines() -> None:
    ours = command_line(Tool.OURS, Path("e/bin/python"), Path("in"), Path("out/put"))
    assert ours == ["e/bin/qavp-export", "--model", "in", "-o", "out/put", "--json"]
    builder = command_line(Tool.BUILDER, Path("e/bin/python"), Path("in"), Path("out/put"))
    assert builder[:3] == ["e/bin/python", "-m", "onnxruntime_genai.models.builder"]
    assert builder[3:11] == ["-i", "in", "-o", "out/put", "-p", "int4", "-e", "cpu"]
