"""Triton kernels, written at run time: for NVIDIA's GPUs first, AMD's by the same source."""
