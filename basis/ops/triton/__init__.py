"""Triton's kernels, each for a device where kernels.py says that it may be used."""
