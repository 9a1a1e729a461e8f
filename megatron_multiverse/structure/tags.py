"""The twelve tags of Multiverse, and what the grammar needs to know of a vocabulary: which ids are which tags, which is
the newline, and which can spell a label."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from megatron_multiverse.errors import ConfigError

TAGS: tuple[str, ...] = (
    "<Think>",
    "</Think>",
    "<Parallel>",
    "</Parallel>",
    "<Goal>",
    "</Goal>",
    "<Outline>",
    "</Outline>",
    "<Path>",
    "</Path>",
    "<Conclusion>",
    "</Conclusion>",
)
"""Literal tags in the order in which the official tokenizer adds them (arXiv 2506.09991, code release)."""

MAX_DEPTH = 8
"""Deepest nesting of blocks that data may have. A deeper sample is refused by preprocessing, and a kernel that lays out
its tokens treats it as plain text."""

_FIRST_CHARACTERS = frozenset("0123456789.:\n<")  # of all that the grammar reads; most of a vocabulary has others
_LABEL_PIECE = re.compile(r"[0-9.]+:?|:")
_LABEL_END = re.compile(r"[0-9.]*:")


class Tag(IntEnum):
    """The kind of a tag: its index in `TAGS`."""

    THINK = 0
    END_THINK = 1
    PARALLEL = 2
    END_PARALLEL = 3
    GOAL = 4
    END_GOAL = 5
    OUTLINE = 6
    END_OUTLINE = 7
    PATH = 8
    END_PATH = 9
    CONCLUSION = 10
    END_CONCLUSION = 11

    @property
    def text(self) -> str:
        """The tag as written, e.g. ``</Path>``."""
        return TAGS[self]


@dataclass(frozen=True)
class StructureVocab:
    """The token ids in which structure is written; everything else is free text to the grammar.

    Args:
        tag_ids: one token id per tag, in the order of `TAGS`.
        newline_id: the token whose text is exactly one newline: it fills every structural gap.
        label_pieces: token id -> text for tokens that can be part of a label such as ``2.1:``.
        eos_id: the end-of-document token, if there is one.
        glued_labels: for each token that holds the end of a label and the text after it, such as ``:**`` or
            ``1:x``, the ids of label pieces that spell its part up to the colon.
    """

    tag_ids: tuple[int, ...]
    newline_id: int
    label_pieces: Mapping[int, str]
    eos_id: int | None = None
    glued_labels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    tag_of: Mapping[int, Tag] = field(init=False, repr=False, compare=False)
    _is_tag: npt.NDArray[np.bool_] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.tag_ids) != len(TAGS) or len(set(self.tag_ids)) != len(TAGS):
            raise ConfigError(
                f"tag_ids ({self.tag_ids}) must be {len(TAGS)} different token ids, one per tag in the order "
                f"{' '.join(TAGS)}; add the tags to the tokenizer as special tokens first"
            )
        object.__setattr__(self, "tag_of", {token: Tag(k) for k, token in enumerate(self.tag_ids)})
        table = np.zeros(max(self.tag_ids) + 1, dtype=np.bool_)
        table[list(self.tag_ids)] = True
        object.__setattr__(self, "_is_tag", table)

    def find_tags(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Indices of the tags in `ids` [N], increasing.

        Tags usually stand side by side in a vocabulary. Comparing with the first and the last of them leaves few ids to
        look up, which is ten times faster than looking up all, and that several times faster than `np.isin`.
        """
        near = np.flatnonzero((ids >= min(self.tag_ids)) & (ids <= max(self.tag_ids)))
        return near[self._is_tag[ids[near]]]

    @classmethod
    def from_pieces(cls, id_to_text: Mapping[int, str] | Sequence[str], *, eos_id: int | None = None) -> StructureVocab:
        """Find the tags, the newline and the pieces of labels in a vocabulary.

        Args:
            id_to_text: for every token id the exact text it decodes to.
            eos_id: id of the end-of-document token.

        Raises:
            ConfigError: a tag or the newline is not a token of its own.
        """
        items: Iterable[tuple[int, str]] = (
            id_to_text.items() if isinstance(id_to_text, Mapping) else enumerate(id_to_text)
        )
        wanted: dict[str, int] = {}
        label_pieces: dict[int, str] = {}
        label_ends: dict[int, str] = {}
        for token, text in items:
            if text[:1] not in _FIRST_CHARACTERS:
                continue
            if text == "\n" or text in TAGS:
                wanted.setdefault(text, token)
            elif _LABEL_PIECE.fullmatch(text):
                label_pieces[token] = text
            elif end := _LABEL_END.match(text):
                label_ends[token] = end.group()
        missing = [repr(text) for text in (*TAGS, "\n") if text not in wanted]
        if missing:
            raise ConfigError(
                f"the vocabulary has no single token for {', '.join(missing)}; each tag and the newline must be "
                "one token: add them as special tokens (build_tokenizer does it for known tokenizers)"
            )
        tag_ids = tuple(wanted[text] for text in TAGS)
        return cls(tag_ids, wanted["\n"], label_pieces, eos_id, _spell(label_ends, label_pieces))

    def path_prefix(self, label_ids: Sequence[int]) -> list[int]:
        """Ids the engine forces at the start of a path: gap newline, ``<Path>``, newline, label."""
        return [self.newline_id, self.tag_ids[Tag.PATH], self.newline_id, *label_ids]

    def conclusion_prefix(self) -> list[int]:
        """Ids the engine forces after the last path: newline, ``<Conclusion>``."""
        return [self.newline_id, self.tag_ids[Tag.CONCLUSION]]


def _spell(texts: Mapping[int, str], label_pieces: Mapping[int, str]) -> dict[int, tuple[int, ...]]:
    """The ids of label pieces that spell each text, as one piece or else character by character."""
    id_of = {text: token for token, text in reversed(list(label_pieces.items()))}
    spelt: dict[int, tuple[int, ...]] = {}
    for token, text in texts.items():
        pieces = [text] if text in id_of else list(text)
        if all(piece in id_of for piece in pieces):
            spelt[token] = tuple(id_of[piece] for piece in pieces)
    return spelt
