"""Images of every kind, readable and not, against arrays written down by hand."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image as transformers_load_image

from qavp_export.errors import ImageError
from qavp_export.manifest import Manifest
from qavp_export.runtime.images import load_image
from qavp_export.runtime.layouts import load_layout
from qavp_export.runtime.processors import load_processor
from qavp_export.runtime.prompts import PromptEncoder

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor(bundle):
    return AutoImageProcessor.from_pretrained(bundle, backend="pil")


@pytest.fixture(scope="module")
def preprocess(bundle):
    """From images to what the vision encoder reads, call by call."""
    manifest = Manifest.read(bundle)
    encoder = PromptEncoder(load_processor(bundle), manifest.vision_tokens, {})
    layout = load_layout(manifest)

    def run(sources):
        prompt = encoder.encode("<image> " * len(sources) + "w1", sources, False)
        return [call["pixel_values"] for call in layout.calls(layout.units(prompt, 0.5))]

    return run


def pixels(source):
    return np.asarray(load_image(source)).tolist()


def test_path_string_pil_and_array_agree(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    expected = RGB.tolist()
    assert pixels(tmp_path / "a.png") == expected
    assert pixels(str(tmp_path / "a.png")) == expected
    assert pixels(Image.fromarray(RGB)) == expected
    assert pixels(RGB) == expected
    assert pixels(RGB[:, ::-1]) == RGB[:, ::-1].tolist()


def test_alpha_is_dropped():
    rgba = np.dstack([RGB, np.full(RGB.shape[:2], 7, np.uint8)])
    assert pixels(Image.fromarray(rgba)) == RGB.tolist()
    assert pixels(rgba) == RGB.tolist()


def test_grey_becomes_three_equal_channels():
    grey = RGB[:, :, 0]
    expected = np.dstack([grey] * 3).tolist()
    assert pixels(Image.fromarray(grey)) == expected
    assert pixels(grey) == expected
    assert pixels(grey[:, :, None]) == expected


def test_black_and_white():
    assert pixels(Image.fromarray(np.array([[True, False]]))) == [[[255] * 3, [0] * 3]]


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.putpixel((1, 0), 1)
    assert pixels(image) == [[[9, 8, 7], [1, 2, 3]]]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    levels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    expected = [[[value] * 3 for value in (0, 0, 1, 128, 255)]]
    assert pixels(tmp_path / "deep.png") == expected
    assert pixels(Image.fromarray(levels.astype(np.int32))) == expected


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif") == [[[255, 0, 0]] * 3] * 2


@pytest.mark.parametrize(
    ("orientation", "turned"), [(1, RGB), (3, RGB[::-1, ::-1]), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB))]
)
def test_exif_orientation_as_in_transformers(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "photo.png", exif=exif)
    assert pixels(tmp_path / "photo.png") == turned.tolist()
    assert pixels(Image.open(tmp_path / "photo.png")) == turned.tolist()
    np.testing.assert_array_equal(np.asarray(transformers_load_image(str(tmp_path / "photo.png"))), turned)


def test_pixel_values_equal_the_processors(processor, preprocess):
    images = [Image.fromarray(RGB), Image.fromarray(np.tile(RGB, (3, 2, 1)))]
    expected = np.concatenate([processor(images=image, return_tensors="np")["pixel_values"] for image in images])
    (values,) = preprocess(images)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)


def test_no_images_need_no_call(preprocess):
    assert preprocess([]) == []


@pytest.mark.parametrize("shape", [(1, 40, 3), (3, 40, 3), (40, 1, 3), (40, 3, 3), (1, 1, 3)])
def test_slivers_are_not_taken_for_channels(preprocess, shape):
    sliver = np.zeros(shape, np.uint8)
    sliver[:, :, 1] = 255
    expected = np.array([-2, 2, -2], np.float32)[:, None, None]  # (0 - 0.5) / 0.25 and (1 - 0.5) / 0.25
    # 1/255 in float32
    np.testing.assert_allclose(preprocess([sliver])[0][0], np.broadcast_to(expected, (3, 4, 4)), atol=1e-6)


def test_image_that_does_not_give_the_encoders_shape(bundle):
    manifest = Manifest.read(bundle)
    processor = load_processor(bundle)
    processor.image_processor.do_resize = False
    encoder = PromptEncoder(processor, manifest.vision_tokens, {})
    square = np.zeros((4, 4, 3), np.uint8)
    prompt = encoder.encode("<image> <image>", [square, RGB], False)
    with pytest.raises(
        ImageError, match=r"uint8> \(7x5\) gives .*\[3, 5, 7\], the bundle takes .*3, 4, 4\]; resize .* 4x4"
    ):
        load_layout(manifest).units(prompt, 0.5)


def bomb(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 64)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bomb(tmp_path, side):
    # Above Pillow's limit (89 million pixels), where it only warns, and above twice that, where it raises.
    (tmp_path / "bomb.png").write_bytes(bomb(side, side))
    check_error(tmp_path / "bomb.png", "pixels")


def test_extreme_aspect_ratio(tmp_path):
    (tmp_path / "thin.png").write_bytes(bomb(20_001, 100))
    check_error(tmp_path / "thin.png", "aspect ratio")


def check_error(source, match):
    with pytest.raises(ImageError, match=match) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_file_and_folder(tmp_path):
    check_error(tmp_path / "none.png", "none.png does not exist")
    check_error(tmp_path, "directory")


@pytest.mark.parametrize("content", [b"", b"hello, I am text\n" * 9, b"\x89PNG\r\n\x1a\n", b"GIF89a\1"])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    check_error(tmp_path / "x.png", "x.png cannot be read")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp"])
def test_truncated_files(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    check_error(path, "cannot be read")


@pytest.mark.parametrize("position", range(8, 200, 7))
def test_damaged_bytes_never_raise_anything_else(tmp_path, position):
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0xFF
    path.write_bytes(data)
    try:
        load_image(path)
    except ImageError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros(3, np.uint8),
    ],
)
def test_arrays_that_are_no_images(array):
    check_error(array, "empty|uint8 array of shape")


@pytest.mark.parametrize("source", [3, None, b"bytes", ["nested"]])
def test_objects_that_are_no_images(source):
    check_error(source, "path, a PIL image or a NumPy array")


def test_pil_images_that_have_no_pixels_or_range():
    check_error(Image.new("RGB", (0, 5)), "empty")
    check_error(Image.new("F", (5, 5)), "floating-point")
    check_error(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "16 bits")
