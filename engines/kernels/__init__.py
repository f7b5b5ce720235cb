"""GPU kernels in Triton: compiled to PTX ahead of time, checked in Triton's interpreter."""
