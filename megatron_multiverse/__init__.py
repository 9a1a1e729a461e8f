"""Megatron-Multiverse: natively parallel generation (arXiv 2506.09991) on the Megatron stack.

Importing the package imports nothing heavy; take what you need from its folders:
`structure` (tags, positions, visibility), `data`, `model`, `checkpoints`, `training`, `inference`, `views`.
"""

__version__ = "0.1.0"
