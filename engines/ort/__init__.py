"""ONNX Runtime: the reference engine, and the engines that run lowered graphs."""
