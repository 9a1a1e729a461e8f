"""Tags, grammar, positions and visibility: the one definition that everything else takes its truth from."""

from megatron_multiverse.structure.document import BlockSpan, Document, PathSpan
from megatron_multiverse.structure.frames import Event, Outline
from megatron_multiverse.structure.layout import Layout, lay_out, pack_layouts, padding_layout, visible_matrix
from megatron_multiverse.structure.machine import StructureMachine
from megatron_multiverse.structure.parser import parse
from megatron_multiverse.structure.statistics import Statistics, measure
from megatron_multiverse.structure.tags import MAX_DEPTH, TAGS, StructureVocab, Tag
from megatron_multiverse.structure.text import Block, Parts, parse_text, render

__all__ = [
    "MAX_DEPTH",
    "TAGS",
    "Block",
    "BlockSpan",
    "Document",
    "Event",
    "Layout",
    "Outline",
    "Parts",
    "PathSpan",
    "Statistics",
    "StructureMachine",
    "StructureVocab",
    "Tag",
    "lay_out",
    "measure",
    "pack_layouts",
    "padding_layout",
    "parse",
    "parse_text",
    "render",
    "visible_matrix",
]
