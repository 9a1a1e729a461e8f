"""Which keys a list of work reads, and which ones segments of prompts, said key by key."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from megatron_multiverse.kernels.tree_decode import SEGMENT, Segments, Work

Ints = npt.NDArray[np.int64]


def reads(work: Work, page_size: int) -> Iterator[tuple[int, Ints, int]]:
    """(query, slots that it reads, number of the part) of every item and query."""
    several = work.tokens.shape[1] > 1
    for item, (base, start, end, part) in enumerate(work.items.tolist()):
        keys = np.arange(start, end)
        listed = work.pages[base + keys // page_size]
        for seat, (token, limit) in enumerate(zip(work.tokens[item].tolist(), work.limits[item].tolist(), strict=True)):
            if token < 0:
                continue
            seen = keys < limit
            pages = listed
            if several:
                shared, begin, part = work.tails[item, :, seat].tolist()
                seen &= (keys < shared) | (keys >= begin)
                assert (keys[seen] % page_size <= np.fmod(listed[seen], page_size)).all(), "a key that is not loaded"
                pages = listed // page_size
            yield token, (pages * page_size + keys % page_size)[seen], part


def prompt_reads(segments: Segments) -> Iterator[tuple[int, Ints]]:
    """(query, slots that it reads), of all segments that look at keys, as FlashAttention understands them."""
    assert len(segments.borders) == len(segments.begins) == len(segments.seen) + 1
    for number, seen in enumerate(segments.seen):
        first, last, begin = segments.borders[number], segments.borders[number + 1], segments.begins[number]
        assert first < last and (last - first <= SEGMENT or not seen)
        for token in range(first, last) if seen else ():
            yield token, segments.slots[begin : begin + seen - (last - 1 - token)].astype(np.int64)


def loaded_slots(work: Work, page_size: int) -> Ints:
    """Slots that the programs load, for whichever query; those of an item in order."""
    found = [np.zeros(0, dtype=np.int64)]
    for base, start, end, _ in work.items.tolist():
        keys = np.arange(start, end)
        offsets, listed = keys % page_size, work.pages[base + keys // page_size].astype(np.int64)
        if work.tokens.shape[1] > 1:
            # The kernel's remainder has the sign of the page.
            there = (offsets <= np.fmod(listed, page_size)) & (listed >= 0 if page_size == 1 else True)
            listed, offsets = listed[there] // page_size, offsets[there]
        found.append(listed * page_size + offsets)
    return np.concatenate(found)


def check_reads(
    work: Work,
    pages: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    borders: Ints,
    page_size: int = 16,
    segments: Segments | None = None,
) -> None:
    """Every query reads each key that it sees once, from the slot where its row has it, its parts are numbered, and
    nothing is loaded that no row sees; nor, of a page that rows have for themselves, behind the last key of the row."""
    found: list[list[Ints]] = [[] for _ in range(borders[-1])]
    parts: list[list[int]] = [[] for _ in found]
    for token, slots, part in reads(work, page_size):
        found[token].append(slots)
        parts[token].append(part)
    counts = np.zeros(len(found), dtype=np.int32)
    counts[: len(work.counts)] = work.counts
    assert [sorted(numbers) for numbers in parts] == [list(range(count)) for count in counts]
    assert counts.max() <= work.slots
    for token, slots in () if segments is None else prompt_reads(segments):
        found[token].append(slots)
    visible = np.zeros((int(pages.max()) + 1) * page_size, dtype=bool)
    for row, length in enumerate(lengths.tolist()):
        keys = np.arange(length)
        slots = pages[row, keys // page_size].astype(np.int64) * page_size + keys % page_size
        visible[slots] = True
        for token in range(borders[row], borders[row + 1]):
            seen = length - borders[row + 1] + token + 1
            assert np.array_equal(np.sort(np.concatenate(found[token])), np.sort(slots[:seen]))
        if (
            work.ends is not None and len(work.ends) == len(lengths) and length % page_size
        ):  # else the next key needs another page
            assert work.pages[work.ends[row]] == slots[-1]
    assert visible[loaded_slots(work, page_size)].all(), "a slot is loaded that no row sees"
