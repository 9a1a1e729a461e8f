"""Models: megatron-core's GPTModel with attention and positions that follow the Multiverse structure."""
