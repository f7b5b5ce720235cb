"""From canonical graphs to networks that TensorRT and TensorRT-RTX parse and build."""
