"""Images in: files, PIL images and arrays become upright 8-bit RGB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from qavp_export.errors import ImageError

ImageSource = str | os.PathLike[str] | Image.Image | NDArray[Any]
"""A path, a PIL image, or an uint8 array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]`."""

# A processor that resizes by the shortest edge turns a sliver of a few kilobytes into gigabytes.
_MAX_ASPECT_RATIO = 200


def load_image(source: ImageSource) -> Image.Image:
    """Reads one image as upright 8-bit RGB.

    Follows `transformers.image_utils.load_image`: the EXIF orientation is applied and alpha is dropped.
    Differs for 16-bit greyscale, which is scaled to 8 bits where Pillow's own conversion would clip it to
    white. Of an animation, a file gives the first frame and a PIL image its current one.

    Raises:
        ImageError: The source is missing, corrupt, empty, too large, or of a kind that is not an image.
    """
    label = describe_source(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, label)
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source, label), label)
        if isinstance(source, (str, os.PathLike)):
            with Image.open(Path(source)) as image:
                return _to_rgb(image, label)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"image {label} does not exist") from None
    except Exception as error:  # Pillow's decoders raise errors of any class on corrupt input
        raise ImageError(f"image {label} cannot be read ({one_line(error)})") from error
    raise ImageError(f"an image is a path, a PIL image or a NumPy array, not {type(source).__name__}")


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """Checks the size before any pixel is decoded, then decodes."""
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"image {label} is empty ({width}x{height})")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ImageError(f"image {label} has {width * height} pixels, more than the limit of {limit}")
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"image {label} is {width}x{height}: its aspect ratio is over the limit of {_MAX_ASPECT_RATIO}"
        )
    if image.mode == "F":
        raise ImageError(f"image {label} has floating-point pixels of unknown range; convert it to 8 bits")
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        levels = np.asarray(upright)
        if levels.min() < 0 or levels.max() > np.iinfo(np.uint16).max:
            raise ImageError(f"image {label} has pixels beyond 16 bits; convert it to 8 bits")
        upright = Image.fromarray((levels >> 8).astype(np.uint8))
    return upright.convert("RGB")


def _from_array(array: NDArray[Any], label: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(f"image {label} is not an uint8 array of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if array.size == 0:
        raise ImageError(f"image {label} is empty ({array.shape[1]}x{array.shape[0]})")
    if array.ndim == 3 and channels == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def describe_source(source: ImageSource) -> str:
    """Returns what an error message calls an image."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, np.ndarray):
        return f"<array {list(source.shape)} {source.dtype}>"
    return f"<{type(source).__name__}>"


def one_line(error: Exception) -> str:
    """Returns why an image could not be read or processed."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
