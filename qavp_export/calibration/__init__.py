"""Calibration data: the image prompts that data-driven quantization sees before the weights are rounded."""

from qavp_export.calibration.data import CalibrationItem, CalibrationSet, demo_calibration, read_calibration

__all__ = ["CalibrationItem", "CalibrationSet", "demo_calibration", "read_calibration"]
