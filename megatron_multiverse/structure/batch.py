"""The counts of many responses at once, for responses that keep every rule; the others are named for `parse` to judge.

machine.py is the definition. This states again only what text without a fault looks like, in arrays over all tags of a
batch, and a test holds it to `parse` and `measure`. In such text a tag and the tag before it decide whether the tag may
stand there and what may stand between the two; beyond that, only the number of open blocks counts, and the labels.

Tags are sorted by depth, then by place. The tags of one block then stand side by side, since those of inner blocks are
deeper, so counting its outlines and paths needs no stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_multiverse.structure.statistics import Statistics
from megatron_multiverse.structure.tags import MAX_DEPTH, StructureVocab, Tag

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_START = len(Tag)
_MAY_FOLLOW: dict[int, tuple[Tag, ...]] = {
    _START: (Tag.THINK, Tag.PARALLEL),
    Tag.THINK: (Tag.END_THINK, Tag.PARALLEL),
    Tag.END_THINK: (Tag.PARALLEL,),
    Tag.PARALLEL: (Tag.GOAL,),
    Tag.END_PARALLEL: (Tag.PARALLEL, Tag.END_PATH, Tag.THINK, Tag.END_THINK),
    Tag.GOAL: (Tag.OUTLINE,),
    Tag.END_GOAL: (Tag.PATH,),
    Tag.OUTLINE: (Tag.END_OUTLINE,),
    Tag.END_OUTLINE: (Tag.OUTLINE, Tag.END_GOAL),
    Tag.PATH: (Tag.PARALLEL, Tag.END_PATH),
    Tag.END_PATH: (Tag.PATH, Tag.CONCLUSION),
    Tag.CONCLUSION: (Tag.END_CONCLUSION,),
    Tag.END_CONCLUSION: (Tag.END_PARALLEL,),
}
_BEFORE_GAP = (Tag.PARALLEL, Tag.GOAL, Tag.END_OUTLINE, Tag.END_GOAL, Tag.END_PATH, Tag.END_CONCLUSION)
"""What follows these is one newline and the next tag."""

# A label is one number in base 12, a digit for each character, so that labels are compared without strings.
_BASE, _DOT, _LONGEST_LABEL = 12, 11, 17
_TOO_LONG = -2  # equal to no label, nor to the -1 for none
_POWERS = np.array([_BASE**k for k in range(_LONGEST_LABEL + 1)], dtype=np.int64)


@dataclass(frozen=True)
class BatchStatistics:
    """`Statistics` of many responses, one array [D] of each. Only where `is_valid` do the counts mean anything."""

    is_valid: BoolArray
    num_tokens: IntArray
    blocks: IntArray
    paths: IntArray
    depth: IntArray
    path_tokens: IntArray
    plain_tokens: IntArray
    critical_tokens: IntArray

    def rows(self) -> list[Statistics | None]:
        """The counts of each response; None where it is not valid."""
        names = [name for name in vars(self) if name != "is_valid"]
        columns = [getattr(self, name).tolist() for name in names]
        rows = zip(self.is_valid.tolist(), zip(*columns, strict=True), strict=True)
        return [Statistics(**dict(zip(names, row, strict=True))) if is_valid else None for is_valid, row in rows]


@dataclass(frozen=True)
class _Tags:
    """The tags of the responses that are still thought valid, in text order or sorted by depth; all arrays [T]."""

    index: IntArray
    kind: IntArray
    document: IntArray
    depth: IntArray

    def take(self, which: npt.NDArray[np.generic]) -> _Tags:
        return _Tags(self.index[which], self.kind[which], self.document[which], self.depth[which])


class BatchMeter:
    """Measures batches of responses.

    Args:
        vocab: the ids in which structure is written.
        max_depth: responses with deeper blocks are not valid.
    """

    def __init__(self, vocab: StructureVocab, *, max_depth: int = MAX_DEPTH) -> None:
        self._vocab = vocab
        self._max_depth = max_depth
        self._may_follow = np.zeros((_START + 1, len(Tag)), dtype=np.bool_)
        for tag, following in _MAY_FOLLOW.items():
            self._may_follow[tag, list(following)] = True
        self._before_gap = np.zeros(_START + 1, dtype=np.bool_)
        self._before_gap[list(_BEFORE_GAP)] = True
        pieces = {token: text for token, text in vocab.label_pieces.items() if len(text) <= _LONGEST_LABEL}
        size = max([*vocab.tag_ids, *pieces]) + 2  # the last entry stands for all larger ids
        self._kind_of = np.full(size, -1, dtype=np.int64)
        self._kind_of[list(vocab.tag_ids)] = np.arange(len(Tag))
        self._piece_length = np.full(size, -1, dtype=np.int64)  # without the colon; -1: no piece
        self._piece_code = np.zeros(size, dtype=np.int64)
        self._ends_label = np.zeros(size, dtype=np.bool_)
        for token, text in pieces.items():
            digits = text.removesuffix(":")
            self._piece_length[token] = len(digits)
            self._piece_code[token] = _code(digits)
            self._ends_label[token] = text.endswith(":")

    def measure(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> BatchStatistics:
        """Measure responses.

        Args:
            ids: their token ids, one after the other, [N].
            lengths: tokens of each, [D].

        Returns:
            The counts; `is_valid` where `parse` finds no fault and no label is longer than 17 characters.
        """
        num_tokens = lengths.astype(np.int64)
        ends = np.cumsum(num_tokens)
        index = self._vocab.find_tags(ids)
        kind = self._kind_of[ids[index]]
        document = np.searchsorted(ends, index, side="right")
        is_valid = np.ones(len(lengths), dtype=np.bool_)
        tags = _Tags(index, kind, document, _depths(kind, document, len(lengths)))
        is_valid[document[self._breaks_order(tags, ids)]] = False
        is_valid[_unbalanced(tags, len(lengths))] = False
        kept = tags.take(is_valid[document] & (kind != Tag.THINK) & (kind != Tag.END_THINK))
        tree = _Tree(kept.take(np.argsort(kept.depth * (len(lengths) + 1) + kept.document, kind="stable")))
        is_valid[tree.documents_with_other_counts()] = False
        for tag, expected in ((Tag.OUTLINE, tree.outline_labels()), (Tag.PATH, tree.path_labels())):
            is_label = tree.tags.kind == tag
            wrong = self._read_labels(ids, tree.tags.index[is_label]) != expected
            is_valid[tree.tags.document[is_label][wrong]] = False
        return tree.count(is_valid, num_tokens)

    def _breaks_order(self, tags: _Tags, ids: npt.NDArray[np.integer]) -> BoolArray:
        """Where a tag may not follow the one before it, not at this depth, or not with this text between them."""
        before = np.full(len(tags.kind), _START)
        same_document = tags.document[1:] == tags.document[:-1]
        before[1:][same_document] = tags.kind[:-1][same_document]
        in_order = self._may_follow[before, tags.kind]
        distance = np.diff(tags.index, prepend=0)
        is_gap = (distance == 2) & (ids[tags.index - 1] == self._vocab.newline_id)
        is_think = (tags.kind == Tag.THINK) | (tags.kind == Tag.END_THINK)
        right_depth = np.where(is_think, tags.depth == 0, (tags.depth > 0) & (tags.depth <= self._max_depth))
        return ~(in_order & (is_gap | ~self._before_gap[before]) & right_depth)

    def _read_labels(self, ids: npt.NDArray[np.integer], tag_index: IntArray) -> IntArray:
        """The code of the label after each tag; -1 where there is none."""
        codes = np.full(len(tag_index), -1, dtype=np.int64)
        last, top = len(ids) - 1, len(self._kind_of) - 1
        rows = np.flatnonzero(ids[np.minimum(tag_index + 1, last)] == self._vocab.newline_id)
        code, length = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        place = tag_index[rows] + 2
        while len(rows):
            # Past the end of the ids, and at the end of a response, stands a tag, which is no piece of a label.
            token = np.minimum(ids[np.minimum(place, last)], top)
            added = self._piece_length[token]
            length = length + added
            fits = (added >= 0) & (length <= _LONGEST_LABEL)
            code = np.where(fits, code * _POWERS[np.maximum(added, 0)] + self._piece_code[token], -1)
            ended = fits & self._ends_label[token]
            codes[rows[ended]] = code[ended]
            going_on = fits & ~ended
            rows, code, length, place = rows[going_on], code[going_on], length[going_on], place[going_on] + 1
        return codes


def _code(label: str) -> int:
    """A label without its colon as a number; no two labels have the same."""
    code = 0
    for character in label:
        code = code * _BASE + (_DOT if character == "." else int(character) + 1)
    return code


def _codes_of_numbers(numbers: IntArray) -> tuple[IntArray, IntArray]:
    """The code and the number of digits of each."""
    codes = np.array([_code(str(k)) for k in range(int(numbers.max(initial=0)) + 1)], dtype=np.int64)
    digits = np.array([len(str(k)) for k in range(len(codes))], dtype=np.int64)
    return codes[numbers], digits[numbers]


def _depths(kind: IntArray, document: IntArray, documents: int) -> IntArray:
    """How many blocks are open at each tag; a block's own tags count it as open."""
    change = (kind == Tag.PARALLEL).astype(np.int64) - (kind == Tag.END_PARALLEL)
    before = np.cumsum(change) - change
    first = np.searchsorted(document, np.arange(documents))
    base = before[np.minimum(first, max(len(before) - 1, 0))] if len(before) else np.zeros(documents, dtype=np.int64)
    return before - base[document] + (kind == Tag.PARALLEL)


def _unbalanced(tags: _Tags, documents: int) -> BoolArray:
    """Documents with a block or a <Think> left open, or with another number of <Think> than one pair."""
    wrong = np.zeros(documents, dtype=np.bool_)
    is_last = np.ones(len(tags.kind), dtype=np.bool_)
    is_last[:-1] = tags.document[1:] != tags.document[:-1]
    ends_block = (tags.kind == Tag.END_PARALLEL) & (tags.depth == 1)
    wrong[tags.document[is_last & ~ends_block & (tags.kind != Tag.END_THINK)]] = True
    opened, closed = (np.flatnonzero(tags.kind == tag) for tag in (Tag.THINK, Tag.END_THINK))
    count_opened, count_closed = (np.bincount(tags.document[which], minlength=documents) for which in (opened, closed))
    wrong |= (count_opened != count_closed) | (count_opened > 1)
    place_opened, place_closed = np.zeros(documents, dtype=np.int64), np.zeros(documents, dtype=np.int64)
    place_opened[tags.document[opened]] = opened
    place_closed[tags.document[closed]] = closed
    return wrong | (place_opened > place_closed)


class _Tree:
    """The blocks and paths in tags that are sorted by depth, outermost first, and then by place.

    Built from responses in which every tag may stand where it stands, so that each block has one goal, one conclusion
    and at least one outline and one path. Arrays are [B] for blocks and [P] for paths.
    """

    def __init__(self, tags: _Tags) -> None:
        self.tags = tags
        opens, is_path, is_outline = (tags.kind == tag for tag in (Tag.PARALLEL, Tag.PATH, Tag.OUTLINE))
        block = np.cumsum(opens) - 1
        self.document, self.depth, self.start = tags.document[opens], tags.depth[opens], tags.index[opens]
        self.goal_end = tags.index[tags.kind == Tag.END_GOAL] + 1
        self.region_end = tags.index[tags.kind == Tag.CONCLUSION] - 1
        self.end = tags.index[tags.kind == Tag.END_PARALLEL] + 1
        self.path_length = tags.index[tags.kind == Tag.END_PATH] + 2 - tags.index[is_path]  # with the newline before
        self.num_paths = np.bincount(block[is_path], minlength=len(self.start))
        self.num_outlines = np.bincount(block[is_outline], minlength=len(self.start))
        self.first_path = np.cumsum(self.num_paths) - self.num_paths
        # The path around a block is the last one opened before it among those that lie one less deep.
        beyond = int(tags.index.max(initial=0)) + 1
        path_keys = tags.depth[is_path] * beyond + tags.index[is_path]
        self.parent = np.searchsorted(path_keys, (self.depth - 1) * beyond + self.start, side="right") - 1
        self.deepest = int(self.depth.max(initial=0))
        self._prefix, self._prefix_length = np.zeros_like(self.start), np.zeros_like(self.start)
        self._label_paths()

    def _blocks_at(self, depth: int) -> slice:
        return slice(*np.searchsorted(self.depth, (depth, depth + 1)).tolist())

    def _paths_of(self, blocks: slice) -> slice:
        first, last = self.first_path[blocks], self.num_paths[blocks]
        return slice(int(first[0]), int(first[-1] + last[-1]))

    def _label_paths(self) -> None:
        self._path_label = np.zeros_like(self.path_length)
        path_length = np.zeros_like(self.path_length)
        for depth in range(1, self.deepest + 1):
            blocks = self._blocks_at(depth)
            if depth > 1:
                self._prefix[blocks] = self._path_label[self.parent[blocks]] * _BASE + _DOT
                self._prefix_length[blocks] = path_length[self.parent[blocks]] + 1
            paths = self._paths_of(blocks)
            self._path_label[paths], path_length[paths] = self._labels(self.num_paths, blocks)

    def _labels(self, counts: IntArray, blocks: slice) -> tuple[IntArray, IntArray]:
        """Codes and lengths of the labels 1, 2, ... up to the count of each of these blocks."""
        counts = counts[blocks]
        first = np.cumsum(counts) - counts
        number = np.arange(1, int(counts.sum()) + 1) - np.repeat(first, counts)
        code, digits = _codes_of_numbers(number)
        length = np.repeat(self._prefix_length[blocks], counts) + digits
        code += np.repeat(self._prefix[blocks], counts) * _POWERS[digits]
        return np.where(length <= _LONGEST_LABEL, code, _TOO_LONG), length

    def path_labels(self) -> IntArray:
        """The code of the label that each path should have."""
        return self._path_label

    def outline_labels(self) -> IntArray:
        """The code of the label that each outline should have."""
        return self._labels(self.num_outlines, slice(None))[0]

    def documents_with_other_counts(self) -> IntArray:
        """Documents with a block whose paths are not as many as its outlines."""
        return self.document[self.num_paths != self.num_outlines]

    def count(self, is_valid: BoolArray, num_tokens: IntArray) -> BatchStatistics:
        """The counts of all documents."""
        region = self.region_end - self.goal_end
        saved = self._saved_tokens(region)
        outermost = self.depth == 1
        structure = self.goal_end - self.start + self.end - self.region_end + 4 * self.num_paths
        depth = np.zeros_like(num_tokens)
        np.maximum.at(depth, self.document, self.depth)

        def total(values: IntArray) -> IntArray:
            sums = np.zeros_like(num_tokens)
            np.add.at(sums, self.document, values)
            return sums

        return BatchStatistics(
            is_valid=is_valid,
            num_tokens=num_tokens,
            blocks=total(np.ones_like(self.start)),
            paths=total(self.num_paths),
            depth=depth,
            path_tokens=total(region * outermost),
            plain_tokens=num_tokens - total(structure),
            critical_tokens=num_tokens - total(saved * outermost),
        )

    def _saved_tokens(self, region: IntArray) -> IntArray:
        """For each block, how many steps shorter its longest path is than all its paths one after the other."""
        saved = np.zeros_like(region)
        steps = self.path_length.copy()
        for depth in range(self.deepest, 0, -1):
            blocks = self._blocks_at(depth)
            paths = self._paths_of(blocks)
            saved[blocks] = region[blocks] - np.maximum.reduceat(steps[paths], self.first_path[blocks] - paths.start)
            if depth > 1:
                np.subtract.at(steps, self.parent[blocks], saved[blocks])
        return saved
