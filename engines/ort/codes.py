"""A key/value cache of 8-bit codes: how keys and values become codes, and whether ONNX Runtime reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from qavp_export.engines import FloatArray, IntArray
from qavp_export.engines.ort.session import Graph
from qavp_export.errors import QavpError, UnavailableError

# Tokens of the answer go beyond the largest values of a prompt, most in channels where these are small by chance: those
# of rotated keys, of which a short prompt shows one side. What goes beyond twice the largest is clamped.
_HEADROOM = 2.0
# No channel's largest value counts as less than this share of its head's.
_FLOOR = 0.5
_LARGEST_CODE = 127


def encode(filled: FloatArray, lengths: IntArray, capacity: int) -> tuple[NDArray[np.int8], FloatArray]:
    """Rounds a prompt's keys or values to codes: `round(x / scale)`, with a scale for each sequence and channel.

    Args:
        filled: Keys or values of a layer `[B,KV,S,d]`, padded on the right.
        lengths: Tokens of each sequence `[B]`; what is behind them is padding and does not count.
        capacity: Tokens that memory is set aside for.

    Returns:
        Codes `[B,KV,capacity,d]` and scales `[B,1,KV*d]`.
    """
    rows, heads, _, channels = filled.shape
    codes = np.zeros((rows, heads, capacity, channels), np.int8)
    scales = np.empty((rows, 1, heads * channels), np.float32)
    for row, length in enumerate(lengths):
        tokens = filled[row, :, :length]
        largest = np.abs(tokens).max(axis=1, keepdims=True)
        largest = np.maximum(largest, _FLOOR * largest.max(axis=2, keepdims=True))
        # A head of zeros has codes of zero, whatever its scale.
        scale = np.maximum(largest * np.float32(_HEADROOM / _LARGEST_CODE), np.finfo(np.float32).tiny)
        codes[row, :, :length] = np.rint(tokens / scale)
        scales[row, 0] = scale.reshape(-1)
    return codes, scales


def check_codes(open_probe: Callable[[], Graph]) -> None:
    """Checks on a small graph that ONNX Runtime writes and reads a cache of codes as it should.

    Args:
        open_probe: Opens the graph; before 1.25 that fails, before 1.27 to run it does.

    Raises:
        BundleError: The graph is missing.
        UnavailableError: ONNX Runtime does not.
    """
    token = np.linspace(-1.75, 2.25, 16, dtype=np.float32)
    past = np.zeros((1, 1, 4, 16), np.int8)
    past[0, 0, :2] = np.arange(-16, 16, dtype=np.int8).reshape(2, 16)[:, ::-1]
    inputs = {"token": token[None, None], "past": past}
    try:
        found = open_probe().run({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()})
    except QavpError as error:
        if error.__cause__ is None:  # what is missing did not fail
            raise
        raise _unavailable(str(error)) from error
    keys = np.concatenate([past[0, 0, :2], np.rint(token)[None]]).astype(np.float64)
    logits = keys @ token / 4
    weights = np.exp(logits - logits.max())
    expected = weights / weights.sum() @ keys
    exact = all((found[name].numpy()[0, 0, :3] == keys).all() for name in ("keys", "values"))
    if not exact or not np.allclose(found["output"].numpy()[0, 0], expected, rtol=0, atol=1e-4):
        raise _unavailable("its attention over codes is not exact")


def _unavailable(reason: str) -> UnavailableError:
    return UnavailableError(
        f"ONNX Runtime {ort.__version__} has no key/value cache of 8-bit codes on this machine ({reason}); "
        "install 1.27 or newer, or leave kv_cache=int8 out"
    )
