"""What the TensorRT engines take, and what they refuse, on a TensorRT that needs no GPU (`fake_tensorrt`)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qavp_export import QavpModel
from qavp_export.cli import run as run_cli
from qavp_export.engines import EngineOptions, load_engine
from qavp_export.engines.tensorrt import runtime
from qavp_export.engines.tensorrt.keys import TENSORRT, engine_folder
from qavp_export.engines.tensorrt.keys import TENSORRT_RTX as RTX
from qavp_export.errors import BundleError, InputError, PromptError, UnavailableError
from qavp_export.manifest import Manifest
from tests.engines.tensorrt_bundle import (
    KEEP,
    MAX_BATCH,
    MAX_IMAGES,
    MAX_PROMPT,
    Install,
    prompts,
)
from tests.runtime.tiny_bundle import ASSISTANT, BOS, HIDDEN, IMAGE, USER, WORDS, reference_answer

OPTIONS = EngineOptions(threads=1)


# --- what comes before the decoder ---


def test_more_images_than_fit_go_in_parts(
    install: Install, reference: QavpModel, pictures: list[np.ndarray[Any, Any]]
) -> None:
    pixels = np.stack([np.moveaxis(picture / 64 - 2, -1, 0) for picture in pictures]).astype(np.float32)
    assert len(pixels) > MAX_IMAGES
    engine = install().open()
    expected, found = (each.encode_images({"pixel_values": pixels}) for each in (reference.engine, engine))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_the_number_of_tokens_is_read_on_the_host(
    install: Install, reference: QavpModel, pictures: list[np.ndarray[Any, Any]]
) -> None:
    pixels = np.moveaxis(np.stack(pictures[:2]) / 64 - 2, -1, 1).astype(np.float32)
    engine = install(keep=True).open()
    expected = reference.engine.encode_images({"pixel_values": pixels})
    two = engine.encode_images({"pixel_values": pixels, KEEP: np.array([2])})
    for found, wanted in zip(two, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    features, indices = engine.encode_images({"pixel_values": pixels, KEEP: np.array([3])})
    assert (features.shape, indices.shape) == ((2, 3, HIDDEN), (2, 3))


def test_embeddings_with_and_without_images(install: Install, reference: QavpModel) -> None:
    engine = install().open()
    features = np.random.default_rng(2).standard_normal((2, 2, HIDDEN)).astype(np.float32)
    ids = np.array([[10, IMAGE, IMAGE, 9], [IMAGE, 8, IMAGE, 9]])
    expected = reference.engine.embed(ids, features)
    np.testing.assert_array_equal(engine.embed(ids, features), expected)
    # Two units in one row.
    np.testing.assert_array_equal(engine.embed(ids, features.reshape(1, 4, HIDDEN)), expected)
    text = np.array([[8, 9, 10]])
    nothing = np.zeros((0, 2, HIDDEN), np.float32)
    np.testing.assert_array_equal(engine.embed(text, nothing), reference.engine.embed(text, nothing))
    with pytest.raises(PromptError, match="have 4 image placeholders and the images 2 features"):
        engine.embed(ids, features[:1])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((MAX_PROMPT + 1,), f"the prompt has {MAX_PROMPT + 1} tokens and the decoder was built for {MAX_PROMPT}"),
        ((3,) * (MAX_BATCH + 1), f"there are {MAX_BATCH + 1} sequences and the decoder was built for {MAX_BATCH}"),
    ],
)
def test_more_than_was_built_for(install: Install, lengths: tuple[int, ...], message: str) -> None:
    session = install().open().start()
    with pytest.raises(InputError, match=message):
        session.prefill(*prompts(lengths))
    # Nothing is broken by it.
    session.prefill(*prompts((3,)))


def test_embeddings_of_more_than_was_built_for(install: Install) -> None:
    engine = install().open()
    with pytest.raises(InputError, match=r"input_ids of the embedding has shape \[1, 49\], and .*embedding.engine was"):
        engine.embed(np.full((1, MAX_PROMPT + 1), 8), np.zeros((0, 2, HIDDEN), np.float32))


def test_a_longer_answer_than_wanted_is_no_reason_to_refuse(install: Install) -> None:
    install().open().start(10_000).prefill(*prompts((3,)))


def test_padding_elsewhere_is_refused(install: Install) -> None:
    embeds, mask, positions = prompts((4, 4))
    mask[1, 2] = 0
    with pytest.raises(InputError, match="pad on the left only"):
        install().open().start().prefill(embeds, mask, positions)


def test_without_a_prompt(install: Install) -> None:
    session = install().open().start()
    with pytest.raises(InputError, match="call prefill first"):
        session.decode(np.array([[7]]), np.ones((1, 1), np.int64), np.array([[0]]))


# --- refusals ---


def test_a_bundle_without_engines(plain: Path) -> None:
    with pytest.raises(UnavailableError, match="has no engine for tensorrt-rtx; export it with --engine "):
        QavpModel.from_bundle(plain, RTX)


@pytest.mark.parametrize(("flavour", "module"), [(TENSORRT, "tensorrt"), (RTX, "tensorrt_rtx")])
def test_without_the_package(install: Install, monkeypatch: pytest.MonkeyPatch, flavour: str, module: str) -> None:
    fake = install(flavour)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UnavailableError,
        match=rf"{module} cannot be imported .*; pip install 'qavp-export\[{flavour.removeprefix('tensorrt-')}\]'$",
    ):
        fake.open(flavour)


def test_without_a_gpu(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install()

    def missing() -> None:
        raise UnavailableError("no NVIDIA driver")

    monkeypatch.setattr(runtime.Device, "open", missing)
    with pytest.raises(UnavailableError, match=r"^engine 'tensorrt' is not available here: no NVIDIA driver$"):
        fake.open()
    assert fake.trt.deserialized == 0


def test_another_gpu_is_refused_before_anything_is_deserialized(install: Install) -> None:
    fake = install(capabilities=(90, 120))
    with pytest.raises(UnavailableError, match=r"it is for compute capability 9.0 or 12.0, the GPU has 8.9: rebuild"):
        fake.open()
    assert fake.trt.deserialized == 0


def test_a_changed_file_is_refused_before_anything_is_deserialized(install: Install) -> None:
    fake = install()
    path = fake.bundle / engine_folder(TENSORRT) / "embedding.engine"
    image = bytearray(path.read_bytes())
    image[len(image) // 2] ^= 1
    path.write_bytes(image)
    with pytest.raises(BundleError, match=r"embedding.engine was changed after the export"):
        fake.open()
    assert fake.trt.deserialized == 0


def test_a_file_that_is_no_engine(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install()
    monkeypatch.setattr(runtime, "check_keys", lambda *_: None)
    (fake.bundle / engine_folder(TENSORRT) / "decoder.engine").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"decoder.engine cannot be deserialized by TensorRT .* \(not an engine: "):
        fake.open()


def test_an_engine_with_other_inputs(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install()
    folder = fake.bundle / engine_folder(TENSORRT)
    monkeypatch.setattr(runtime, "check_keys", lambda *_: None)
    shutil.copyfile(folder / "embedding.engine", folder / "vision_encoder.engine")
    with pytest.raises(BundleError, match=r"inputs and outputs of a vision encoder \(image_features, input_ids, "):
        fake.open()


def test_options_of_other_engines(install: Install) -> None:
    fake = install()
    for options in (EngineOptions(vision="w8a8"), EngineOptions(cpu_memory="low"), EngineOptions(kv_cache="int8")):
        with pytest.raises(
            InputError, match="engine tensorrt runs what was built; leave vision, cpu_memory and kv_cache out"
        ):
            load_engine(TENSORRT, fake.bundle, Manifest.read(fake.bundle), options)


def test_the_command_line(
    install: Install, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: Any
) -> None:
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    arguments = ["--image", str(tmp_path / "a.png"), "--prompt", "w0 w3", "--max-new-tokens", "6"]
    fake = install(RTX)
    assert run_cli.main([str(fake.bundle), "--engine", RTX, *arguments]) == 0
    words = [BOS, USER, pictures[0], WORDS.index("w0"), WORDS.index("w3"), ASSISTANT]
    expected = " ".join(WORDS[token] for token in reference_answer(words, 6) if token >= 5)
    assert capsys.readouterr().out == f"{expected}\n"
    assert run_cli.main([str(plain), "--engine", RTX, *arguments]) == 3
    assert capsys.readouterr().err.strip().endswith("export it with --engine tensorrt-rtx --sm NN")
