"""Models: megatron-core's GPTModel with attention and positions that follow the Multiverse structure."""

from megatron_multiverse.model import mcore as mcore  # before any other module here: imports megatron-core quietly
