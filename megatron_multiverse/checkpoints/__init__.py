"""Checkpoints of Hugging Face and of megatron-core: opened, loaded, converted and compared, one tensor at a time.

At the top stands what acts on whole checkpoints; `formats/` has a file or two for each file format, `names/` what the
tensors are called and how they are cut. Everything runs on a CPU.
"""
