"""Reads canonical graphs, for every engine that lowers them; needs onnx-ir, so the exporter does it."""
