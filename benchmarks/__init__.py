"""All benchmarks: `bench_*.py` run on a CPU, those of `kernels/` on a GPU. Run them from a checkout."""
