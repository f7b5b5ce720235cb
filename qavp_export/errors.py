"""Errors that qavp-export raises on purpose.

Every message is one line that says what was wrong, where, and what to do about it. The command line prints that
line and exits with the class's `exit_code`; anything that is not a `QavpError` is a bug in qavp-export.
"""

from __future__ import annotations

from typing import ClassVar


class QavpError(Exception):
    """Base class of all errors raised on purpose.

    Attributes:
        exit_code: What the command line exits with: 1 unless a subclass says otherwise.
    """

    exit_code: ClassVar[int] = 1


class InputError(QavpError):
    """Something the user gave is wrong: a flag, a file, a folder. Exit code 2."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe field is out of range, unknown, or does not fit the checkpoint."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, corrupt or of a kind that is not supported."""


class CalibrationError(InputError):
    """Calibration data are missing, malformed, too large, or lead out of their folder."""


class BundleError(InputError):
    """A bundle is missing, incomplete, corrupt, or written by an incompatible version."""


class ImageError(InputError):
    """An image cannot be read."""


class PromptError(InputError):
    """A prompt does not fit: too long for the context, or its images do not match its placeholders."""


class GraphError(InputError):
    """An ONNX graph lacks what a pass needs, for example the value to prune at."""


class UnavailableError(QavpError):
    """The requested engine, device or download is not available on this machine. Exit code 3."""

    exit_code = 3


class ParityError(QavpError):
    """The exported graphs differ from the reference by more than the stated tolerance. Exit code 4."""

    exit_code = 4
