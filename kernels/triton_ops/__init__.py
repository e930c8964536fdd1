"""Triton kernels of the hot operations, one file each. Every module here imports triton: import them at first use only."""
