"""The most parallel texts of an output or a data set as pages: the plain text beside the tree."""

from __future__ import annotations

import heapq
from pathlib import Path

from megatron_multiverse.curation.trees import plain_text
from megatron_multiverse.curation.viewer import write_page
from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import Document, Statistics, measure_blocks, parse_text


class MostParallel:
    """Keeps the texts with the most tokens per token of the longest chain.

    Args:
        count: how many; 0 keeps none.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[tuple[float, int, str, str, Document, Statistics]] = []

    def offer(self, number: int, question: str, text: str, document: Document, statistics: Statistics) -> None:
        """Keep a text if it is among the most parallel ones; of equal ones the first. Texts without a block and those
        that break the grammar have no tree to show.

        Args:
            number: of the text among all, from 1.
            question: what it answers.
            text: the whole response.
            document: its structure.
            statistics: what `measure` says of that.
        """
        if self._count and document.blocks and not document.malformed:
            heapq.heappush(self._kept, (statistics.num_parallel, -number, question, text, document, statistics))
            if len(self._kept) > self._count:
                heapq.heappop(self._kept)

    def write(self, folder: Path, unit: str) -> int:
        """Write one page for each, named by its number, in place of those of an earlier time; returns how many.

        Args:
            folder: made if it is missing.
            unit: what lengths are counted in.
        """
        for page in folder.glob("[0-9]" * 6 + ".html"):
            page.unlink()
        written = 0
        for num_parallel, number, question, text, document, statistics in sorted(self._kept, reverse=True):
            try:
                parts = parse_text(text)
            except StructureError:
                continue  # in order token by token, though not as text: its layout is not the canonical one
            folder.mkdir(exist_ok=True)
            gains = [row.sequential_tokens / max(row.critical_tokens, 1) for row in measure_blocks(document)]
            write_page(
                folder / f"{-number:06d}.html",
                title=f"Text {-number}",
                question=question,
                original=plain_text(parts),
                parts=parts,
                blocks=[{"kind": "", "net_gain": gain} for gain in gains],
                facts={
                    "blocks": statistics.blocks,
                    "paths": statistics.paths,
                    "depth": statistics.depth,
                    "# parallel": f"{num_parallel:.2f}",
                    "net gain": f"{statistics.net_gain:.2f}",
                    f"{unit}, all": statistics.num_tokens,
                    f"{unit}, longest chain": statistics.critical_tokens,
                },
            )
            written += 1
        return written
