"""Training: one visible loop (trainer.py) and the parts it calls, one file each."""

from megatron_multiverse.model import mcore as mcore  # before any other module here: imports megatron-core quietly
