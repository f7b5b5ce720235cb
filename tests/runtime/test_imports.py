"""The runtime works where neither torch nor the exporter's libraries are installed."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.runtime.tiny_bundle import ASSISTANT, BOS, USER, WORDS, reference_answer
from tests.runtime.torch_free import run_torch_free


def test_generates_with_only_the_runtimes_distributions(bundle, tmp_path, pictures):
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    report = run_torch_free(bundle, "ort-reference", tmp_path / "a.png", ("w0 w3", "w1"))

    def chat(shown, *words):
        return [BOS, USER, *shown, *(WORDS.index(word) for word in words), ASSISTANT]

    expected = [
        reference_answer(chat([np.asarray(pictures[0])], "w0", "w3"), 6),
        reference_answer(chat([], "w1"), 6),
    ]
    assert report.ids == expected
    assert report.answer == report.streamed == " ".join(WORDS[i] for i in expected[0] if i >= 5)
    report.check_distributions()

    allowed = ("qavp_export.runtime", "qavp_export.engines")
    others = {name for name in report.own if not name.startswith(allowed)}
    numerics = {f"qavp_export.numerics{name}" for name in ("", ".select", ".diverse", ".score", "._checks")}
    assert others == {"qavp_export", "qavp_export.errors", "qavp_export.manifest", *numerics}
