"""CUDA without torch."""
