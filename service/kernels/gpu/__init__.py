"""Triton kernels for CUDA devices. Nothing imports this room but the dispatch table, at the first call: triton may be missing."""
