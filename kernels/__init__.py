"""Operators, one folder each: a plain reference, the kernels, a README with the mathematics.

Imported as `megatron_multiverse.kernels`. Nothing here imports anything but torch and triton.
"""
