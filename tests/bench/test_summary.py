"""Statistics on made-up timings, and what is written of them."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from qavp_export.bench.accuracy import Accuracy
from qavp_export.bench.charts import charts
from qavp_export.bench.comparison import Comparison, Measured, Missing, Plan
from qavp_export.bench.contestant import Loaded
from qavp_export.bench.load import LoadRun
from qavp_export.bench.page import page, write_report
from qavp_export.bench.summary import METRICS, STAGES, summarize
from qavp_export.bench.tables import CSV_FIELDS, print_summary, to_csv
from tests.bench.made_up import entries, requests, sample

LOADED = Loaded(load_seconds=0.5, host_before_bytes=100, device=None)


@pytest.fixture
def summary(bundle: Path) -> dict:
    first, second, third = entries(bundle, "ort-cpu", "tensorrt", "ort-cuda")
    rounds = range(1, 102)
    slow = Measured(first, LOADED, 5_000, [sample(number) for number in rounds], 2_000_000)
    slow.scoring = ([0.005] * 9, [0.003] * 9)
    slow.load = LoadRun(2, 4.0, tuple(sample(1) for _ in range(6)))
    hostile = "</li><script>alert(1)</script>"
    fast = [sample(number / 2, answer=hostile, vision_tokens=1) for number in rounds]
    quick = Measured(second, LOADED, 5_000, fast, 1_000_000, device_peak_bytes=3_000_000)
    quick.scoring_reason = "one serialized engine"
    comparison = Comparison((slow, quick), (Missing(third, "no <NVIDIA> driver", failed=False),))
    plan = Plan((first, second, third), requests(2), 2, len(rounds), 2, 4.0)
    return summarize(comparison, plan, {bundle: Accuracy(0.75, 0.7, 0.8, "demo, 60 questions")})


def test_percentiles_are_those_of_the_samples(summary: dict) -> None:
    slow, quick = summary["contestants"]
    # Of 1 to 101 milliseconds, times what a stage takes.
    for stage, factor in {"preprocess": 1, "vision_encoder": 2, "embedding": 3, "prefill": 4, "other": 1}.items():
        expected = {"p50": 51 * factor, "p90": 91 * factor, "p99": 100 * factor, "samples": 101}
        assert slow["stages"][stage] == pytest.approx(expected, rel=1e-9), stage
    # Every token counts: two for each answer.
    assert slow["stages"]["decode"]["samples"] == 202
    assert slow["stages"]["decode"]["p50"] == pytest.approx(5 * 51, rel=1e-9)
    assert slow["decode_in_all_ms"]["p50"] == pytest.approx(10 * 51, rel=1e-9)
    assert slow["metrics"]["ttft"]["p90"] == pytest.approx(910, rel=1e-9)
    assert slow["metrics"]["tpot"]["p50"] == pytest.approx(255, rel=1e-9)
    assert slow["metrics"]["end_to_end"]["p99"] == pytest.approx(2100, rel=1e-9)
    assert slow["tokens_per_second"] == pytest.approx(3 / (21 * 0.051), rel=1e-9)
    assert quick["stages"]["prefill"]["p50"] == pytest.approx(102, rel=1e-9)
    assert set(slow["stages"]) == set(STAGES)
    assert set(slow["metrics"]) == set(METRICS)


def test_ratios_of_rounds_that_are_twice_as_fast_have_no_width(summary: dict) -> None:
    slow, quick = summary["contestants"]
    assert summary["baseline"] == "tiny ort-cpu"
    half = pytest.approx({"estimate": 0.5, "low": 0.5, "high": 0.5}, rel=1e-9)
    assert set(quick["ratios"]) == {"preprocess", "vision_encoder", "embedding", "prefill", "decode", *METRICS}
    assert all(interval == half for interval in quick["ratios"].values())
    assert slow["ratios"]["end_to_end"] == {"estimate": 1.0, "low": 1.0, "high": 1.0}


def test_scoring_is_a_difference_or_has_a_reason(summary: dict) -> None:
    slow, quick = summary["contestants"]
    found = slow["stages"]["scoring_and_gather"]
    assert found["p50"] == pytest.approx(2.0, rel=1e-9)
    assert found["interval_95"] == pytest.approx([2.0, 2.0], rel=1e-9)
    assert quick["stages"]["scoring_and_gather"]["p50"] is None
    assert quick["stages"]["scoring_and_gather"]["reason"] == "one serialized engine"


def test_load_test_is_throughput_and_tail(summary: dict) -> None:
    slow, quick = summary["contestants"]
    assert slow["load_test"]["requests_per_second"] == 1.5
    assert slow["load_test"]["tokens_per_second"] == 4.5
    assert slow["load_test"]["end_to_end"]["p99"] == pytest.approx(21, rel=1e-9)
    assert quick["load_test"] is None


def test_json_holds_everything(summary: dict) -> None:
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    (missing,) = summary["unavailable"]
    assert (missing["engine"], missing["reason"], missing["failed"]) == ("ort-cuda", "no <NVIDIA> driver", False)
    assert summary["settings"]["repeats"] == 101
    assert any("CUDA graphs" in line for line in summary["inside"])
    slow, quick = summary["contestants"]
    assert (slow["device_peak_bytes"], quick["device_peak_bytes"]) == (None, 3_000_000)
    assert slow["accuracy"] == {"accuracy": 0.75, "interval_95": [0.7, 0.8], "source": "demo, 60 questions"}
    assert len(slow["samples"]) == 101
    assert slow["vision_tokens"] == {"before": 4, "after": 2}


def test_csv_has_a_line_for_each_figure(summary: dict) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert tuple(lines[0]) == CSV_FIELDS
    of_quick = {line["name"]: line for line in lines if line["engine"] == "tensorrt"}
    assert set(of_quick) >= {*STAGES, *METRICS, "load_seconds", "host_peak_bytes", "device_peak_bytes", "bundle_bytes"}
    assert float(of_quick["prefill"]["p50"]) == pytest.approx(102, rel=1e-9)
    assert float(of_quick["prefill"]["ratio"]) == pytest.approx(0.5, rel=1e-9)
    assert of_quick["scoring_and_gather"]["p50"] == ""
    assert [(line["engine"], line["note"]) for line in lines if line["kind"] == "unavailable"] == [
        ("ort-cuda", "no <NVIDIA> driver")
    ]
    assert {line["name"] for line in lines if line["kind"] == "load test"} == {"ttft", "end_to_end"}


def test_table_says_what_is_where(summary: dict) -> None:
    console = Console(width=140, file=io.StringIO())
    print_summary(summary, console)
    text = console.file.getvalue()
    assert re.search(r"prefill +204 / 364 / 400 +102 / 182 / 200\n", text)
    assert re.search(r"end to end, ratio +1\.00 \[1\.00, 1\.00\] +0\.50 \[0\.50, 0\.50\]\n", text)
    assert re.search(r"of it scoring, gather +2\.00 \[2\.00, 2\.00\] +-\n", text)
    assert re.search(r"accuracy +75\.0% \[70\.0, 80\.0\]", text)
    assert "tiny ort-cuda: no <NVIDIA> driver\n" in text
    assert "against tiny ort-cpu" in text
    assert "CUDA graphs" in text


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text.append(data)


def test_report_is_one_page_that_asks_for_nothing(summary: dict, tmp_path: Path) -> None:
    summary["contestants"][1]["bundle"] = "another"
    written = write_report(summary, tmp_path / "report.html")
    keys = ["stages", "latency-keep", "accuracy-latency", "accuracy-keep"]
    assert [path.name for path in written] == ["report.html", *(f"report-{key}.png" for key in keys)]
    for picture in written[1:]:
        with Image.open(picture) as image:
            assert image.format == "PNG"
    html = written[0].read_text(encoding="utf-8")
    read = _Page()
    read.feed(html)
    sources = [attrs[name] for _, attrs in read.tags for name in ("src", "srcset", "href") if name in attrs]
    assert len(sources) == 2 * len(keys)  # light and dark
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data).startswith(b"<?xml")
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r'"data:[^"]*"', "", html))
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "iframe"})
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in read.tags
    assert "prefers-color-scheme: dark" in html
    text = " ".join("".join(read.text).split())
    assert "<script>alert(1)</script>" in text
    assert "tiny ort-cuda : no <NVIDIA> driver" in text.replace("ort-cuda:", "ort-cuda :")
    assert "one serialized engine" in text


def test_charts_are_those_that_the_figures_are_enough_for(summary: dict) -> None:
    # Two engines of one bundle: its accuracy is one point, no curve.
    assert [chart.key for chart in charts(summary)] == ["stages", "latency-keep", "accuracy-latency"]
    for contestant in summary["contestants"]:
        contestant["accuracy"] = None
        contestant["vision_tokens"]["after"] = 2
    assert [chart.key for chart in charts(summary)] == ["stages"]
    summary["contestants"] = []
    summary["baseline"] = None
    assert charts(summary) == []
    assert "no &lt;NVIDIA&gt; driver" in page(summary, [])
