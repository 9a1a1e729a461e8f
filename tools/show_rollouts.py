"""Looks at the answers that a run of reinforcement learning kept: a table of all, or one of them in full.

Examples:
    python tools/show_rollouts.py --input runs/rl/run/rollouts.jsonl
    python tools/show_rollouts.py --input runs/rl/run/rollouts.jsonl --line 5 --tokenizer-model runs/rl/sft/model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import TokenizerType
from megatron_multiverse.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show kept answers."""

    input: Path
    """rollouts.jsonl of a run, or records of tools/generate.py."""
    line: int | None = None
    """Show the answer in this line, from 1, segment by segment; needs tokenizer_model."""
    timeline: Path | None = None
    """Picture of that answer's branches over decode steps to write; with --line."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer."""
    tokenizer_model: str = ""
    """Tokenizer of the model."""

    def __post_init__(self) -> None:
        if self.timeline is not None and self.line is None:
            raise ConfigError(
                f"--timeline {self.timeline} draws one answer: name it with --line 1; without both, all are listed"
            )


def main() -> None:
    options = parse_options(Options)
    from megatron_multiverse.data.tokenizers import build_tokenizer
    from megatron_multiverse.inference import from_record
    from megatron_multiverse.views.figures import draw_timeline
    from megatron_multiverse.views.rollouts import read_records, segments, table

    records = read_records(options.input)
    if options.line is None:
        print("\n".join(table(records)))
        return
    if not 1 <= options.line <= len(records):
        raise ConfigError(f"--line {options.line}: {options.input} has the lines 1 to {len(records)}")
    record = records[options.line - 1]
    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model)
    print("\n".join([*table([record], first=options.line), *segments(record, tokenizer)]))
    if options.timeline is not None:
        draw_timeline(from_record(record).timeline, options.timeline)


if __name__ == "__main__":
    run_tool(main)
