"""Benchmarks of the kernels beside their rivals: `python -m benchmarks.kernels.attention`."""
