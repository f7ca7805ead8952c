"""Normalization layers, kernels, studies and tools for PyTorch."""
