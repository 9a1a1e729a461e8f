"""Checkpoints between Hugging Face and megatron-core, as streams of tensors. Runs on a CPU."""
