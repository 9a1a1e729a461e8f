"""Benchmarks of the kernels beside their rivals: `python -m megatron_multiverse.kernels.benchmarks.attention`."""
