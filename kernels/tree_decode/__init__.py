"""Attention over a paged cache in which branches share the pages of their prefix."""

from megatron_multiverse.kernels.tree_decode.reference import RowGroup, group_rows, tree_decode_reference

tree_decode = tree_decode_reference

__all__ = ["RowGroup", "group_rows", "tree_decode", "tree_decode_reference"]
