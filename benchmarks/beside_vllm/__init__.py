"""The engine beside vLLM on one GPU, in one run: `python -m benchmarks.beside_vllm`."""
