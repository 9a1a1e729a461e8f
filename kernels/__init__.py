"""Operators, one folder each, all alike: `__init__.py` holds the public function, which chooses; `reference.py` is the
plain version; `triton_*.py` are the kernels; README.md has the mathematics.

Imported as `megatron_multiverse.kernels`. Of the package nothing but `errors` and `structure` is imported here, and of
others torch, Triton, and the libraries of a single attention backend where that backend runs. Benchmarks stand in
`benchmarks/kernels/`.
"""
