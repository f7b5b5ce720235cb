"""TensorRT and TensorRT-RTX: engines that are built ahead of time, and what runs them."""
