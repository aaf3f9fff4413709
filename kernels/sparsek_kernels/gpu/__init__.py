"""Triton kernels: the same functions as the PyTorch path, for CUDA devices."""
