"""The structure of a Multiverse text: its tags, its grammar, and what they mean for positions, visibility and loss.

A response is text in which a *block* splits the work: its goal announces one *path* per outline, the paths are written
at the same time and do not see each other, and a conclusion, which sees all of them, follows (arXiv 2506.09991). This
package is the one definition of that. Data, kernels, training and decoding all ask here, so they agree token for token.
It works on token ids and plain integers, and does not import torch.

Read in this order: `tags.py` (the twelve tags, and what must be known of a vocabulary), `document.py` (where blocks and
paths stand), `machine.py` (the grammar, one token at a time), `prompt.py` (what the tags of a prompt mean for it),
`parser.py` (a whole sample), `layout.py` (positions, visibility labels, loss). `trajectory.py` writes and reads
trajectories as strings, `statistics.py` measures how parallel a sample is. docs/structure.md explains the same with
pictures.
"""

from megatron_multiverse.structure.batch import BatchMeter, BatchStatistics
from megatron_multiverse.structure.document import BlockSpan, Document, PathSpan
from megatron_multiverse.structure.frames import Event, Outline
from megatron_multiverse.structure.layout import (
    Layout,
    lay_out,
    pack_layouts,
    padding_layout,
    share_prefix,
    visible_matrix,
)
from megatron_multiverse.structure.machine import StructureMachine
from megatron_multiverse.structure.parser import parse
from megatron_multiverse.structure.prompt import Thought, last_thought, opens_thought
from megatron_multiverse.structure.statistics import (
    BlockStatistics,
    Statistics,
    acceleration_ratio,
    measure,
    measure_blocks,
    saved_share,
)
from megatron_multiverse.structure.tags import MAX_DEPTH, TAGS, StructureVocab, Tag
from megatron_multiverse.structure.trajectory import (
    TEXT_ID,
    Block,
    Parts,
    check_text,
    cut_at_labels,
    lex,
    parse_text,
    render,
)

__all__ = [
    "MAX_DEPTH",
    "TAGS",
    "TEXT_ID",
    "BatchMeter",
    "BatchStatistics",
    "Block",
    "BlockSpan",
    "BlockStatistics",
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
    "Thought",
    "acceleration_ratio",
    "check_text",
    "cut_at_labels",
    "last_thought",
    "lay_out",
    "lex",
    "measure",
    "measure_blocks",
    "opens_thought",
    "pack_layouts",
    "padding_layout",
    "parse",
    "parse_text",
    "render",
    "saved_share",
    "share_prefix",
    "visible_matrix",
]
