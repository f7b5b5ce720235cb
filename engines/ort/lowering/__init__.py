"""From canonical graphs to those that ONNX Runtime runs fast; needs onnx-ir, so the exporter does it."""
