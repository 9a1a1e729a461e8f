"""Counts of a preprocessing run: summed over shards, printed at the end, kept in the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron_multiverse.structure import Statistics


@dataclass
class Totals:
    """Sums over documents; lengths in tokens."""

    rows: int = 0
    documents: int = 0
    documents_with_blocks: int = 0
    text_bytes: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    critical_tokens: int = 0
    plain_tokens: int = 0
    """Responses without tags, goals and conclusions."""
    path_tokens: int = 0
    blocks: int = 0
    paths: int = 0
    depth: int = 0
    longest: int = 0
    checked_texts: int = 0
    changed_texts: int = 0
    """Of the checked texts, those that do not decode to the text that was encoded."""
    ended: int = 0
    """Documents whose response ends with the end token."""
    untagged: int = 0
    """Documents whose response holds no tag at all."""
    rejected: Counter[str] = field(default_factory=Counter)

    def add_document(self, prompt_tokens: int, response_tokens: int, statistics: Statistics) -> None:
        """Count one written document."""
        self.documents += 1
        self.documents_with_blocks += statistics.blocks > 0
        self.prompt_tokens += prompt_tokens
        self.response_tokens += response_tokens
        self.critical_tokens += statistics.critical_tokens
        self.plain_tokens += statistics.plain_tokens
        self.path_tokens += statistics.path_tokens
        self.blocks += statistics.blocks
        self.paths += statistics.paths
        self.depth = max(self.depth, statistics.depth)
        self.longest = max(self.longest, prompt_tokens + response_tokens)

    def merge(self, other: dict[str, Any]) -> None:
        """Add the totals of one shard, as written by `as_dict`."""
        for name, value in other.items():
            if name in ("depth", "longest"):
                setattr(self, name, max(getattr(self, name), value))
            elif name == "rejected":
                self.rejected.update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "rejected": dict(self.rejected)}

    def lines(self) -> list[str]:
        """The report, one fact per line."""
        tokens, critical = self.response_tokens, max(self.critical_tokens, 1)
        lines = [
            f"documents   {self.documents:,} of {self.rows:,} rows, {self.documents_with_blocks:,} with blocks",
            f"tokens      {self.prompt_tokens:,} prompt, {tokens:,} response; longest document {self.longest:,}",
            f"structure   {self.blocks:,} blocks, {self.paths:,} paths, depth {self.depth}, "
            f"{self.path_tokens / max(tokens, 1):.1%} of response tokens in paths",
            f"parallelism num_parallel {tokens / critical:.3f}, net gain {self.plain_tokens / critical:.3f} "
            "(plain text / critical path: below 1 the structure costs more than it saves)",
        ]
        if self.ended < self.documents:
            how_many = "no response ends" if not self.ended else f"{self.documents - self.ended:,} responses do not end"
            lines.append(
                f"WARNING     {how_many} with the end token: a model trained on this does not learn to stop; "
                "--append-eod writes it"
            )
        if self.changed_texts:
            lines.append(
                f"WARNING     {self.changed_texts:,} of {self.checked_texts:,} checked texts do not decode to "
                "themselves: the tokenizer normalizes text or lacks characters"
            )
        reasons = ", ".join(f"{code} {count:,}" for code, count in self.rejected.most_common())
        lines.append(f"rejected    {self.rejected.total():,} rows" + (f" ({reasons})" if reasons else ""))
        return lines
