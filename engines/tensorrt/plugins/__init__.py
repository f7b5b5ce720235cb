"""TensorRT plugins with kernels that are compiled ahead of time and embedded in the engine."""

from qavp_export.engines.tensorrt.plugins.register import register_plugins

__all__ = ["register_plugins"]
