"""Draws the structure of a sample: who sees whom, positions, branches over time; prints its statistics.

Example:
    python tools/show_structure.py --input docs/images/example.txt --output-dir docs/images
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import TokenizerType
from megatron_multiverse.structure import measure
from megatron_multiverse.views.figures import draw_positions, draw_timeline, draw_visibility
from megatron_multiverse.views.sample_file import load_view
from megatron_multiverse.views.sample_view import ideal_timeline, sequential_timeline


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Draw one sample or one output of the engine as PNGs."""

    input: str
    """Trajectory text, JSON Lines file with `prompt` and `response` (or Multiverse-1K's columns), or - for stdin."""
    output_dir: Path = Path("runs/structure")
    """Folder for visibility.png, positions.png and timeline.png."""
    row: int = 0
    """Row of a JSON Lines file, from 0."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer; used with tokenizer_model."""
    tokenizer_model: str = ""
    """Tokenizer to count tokens with; without it each word, tag and newline is one token."""
    strict: bool = False
    """Stop with an error at the first broken rule, instead of reading broken structure as plain text."""


def main() -> None:
    options = parse_options(ShowOptions)
    view = load_view(options.input, options.row, options.tokenizer_type, options.tokenizer_model, strict=options.strict)
    draw_visibility(view, options.output_dir / "visibility.png")
    draw_positions(view, options.output_dir / "positions.png")
    draw_timeline(ideal_timeline(view), options.output_dir / "timeline.png", sequential=sequential_timeline(view))
    for name, value in dataclasses.asdict(measure(view.document)).items():
        print(f"{name:<16} {value:.3f}" if isinstance(value, float) else f"{name:<16} {value}")
    for code, count in view.document.malformed.items():
        print(f"malformed        {code} ({count})")
    print(f"pictures         {options.output_dir}/visibility.png positions.png timeline.png")


if __name__ == "__main__":
    run_tool(main)
