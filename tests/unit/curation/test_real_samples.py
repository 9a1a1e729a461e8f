"""Real trajectories of Multiverse-1K, de-tagged, through the whole command; and the gate on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_multiverse.curation.gate import flatten_losing
from megatron_multiverse.curation.inputs import PARALLEL, SEQUENTIAL
from megatron_multiverse.curation.token_counts import RoughTokens, TrainingTokens, count_plain, tree_document
from megatron_multiverse.curation.trees import ANNOUNCEMENT, parse_think, plain_text
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.structure import TAGS, Block, Parts, measure
from tests.unit.curation.anthropic_server import AnthropicServer
from tests.unit.curation.conftest import Run
from tests.unit.curation.scripted import Script

# Blocks (outermost, all), depth, paths, share in paths, share of structure and parallelism, as they were measured on
# the published files by another program: a token is four characters, a tag one token.
MEASURED = {
    "1.xml": (5, 11, 2, 27, 0.824, 0.180, 1.248),
    "2.xml": (4, 4, 1, 10, 0.350, 0.091, 1.209),
    "3.xml": (7, 7, 1, 15, 0.324, 0.197, 1.115),
    "4.xml": (2, 2, 1, 4, 0.739, 0.055, 1.505),
    "5.xml": (2, 3, 2, 6, 0.383, 0.111, 1.080),
    "7.xml": (3, 3, 1, 8, 0.233, 0.107, 1.084),
    "8.xml": (3, 4, 2, 10, 0.273, 0.042, 1.126),
    "9.xml": (3, 5, 2, 11, 0.184, 0.091, 1.087),
    "10.xml": (5, 7, 2, 14, 0.319, 0.090, 1.130),
    "11.xml": (4, 7, 2, 20, 0.475, 0.106, 1.188),
    "12.xml": (7, 10, 2, 21, 0.281, 0.211, 1.165),
    "13.xml": (2, 2, 1, 4, 0.537, 0.049, 1.147),
    "14.xml": (4, 8, 2, 22, 0.398, 0.289, 1.216),
    "15.xml": (4, 12, 2, 32, 0.770, 0.285, 2.061),
}


def tokens(text: str) -> float:
    """Four characters are a token, a tag is one."""
    tags = 0
    for tag in TAGS:
        tags += text.count(tag)
        text = text.replace(tag, "")
    return tags + len(text) / 4


def goal(block: Block, prefix: str) -> str:
    outlines = (f"<Outline>\n{prefix}{k}: {text}\n</Outline>" for k, text in enumerate(block.outlines, 1))
    return "\n".join(["<Parallel>", "<Goal>", *outlines, "</Goal>"])


def measured(parts: Parts, prefix: str = "") -> tuple[float, float, float]:
    """Tokens of all text, of its critical path, and of what is structure, for a text with its announcements."""
    total = critical = structure = 0.0
    for part in parts:
        if isinstance(part, str):
            total += tokens(part)
            critical += tokens(part)
            continue
        total += tokens(ANNOUNCEMENT)
        critical += tokens(ANNOUNCEMENT)
        around = tokens(goal(part, prefix)) + tokens(f"<Conclusion>\n{part.conclusion}\n</Conclusion>\n</Parallel>")
        lengths = []
        for k, path in enumerate(part.paths, 1):
            inner = measured(path, f"{prefix}{k}.")
            label = tokens(f"<Path>\n{prefix}{k}: \n</Path>\n")
            total += inner[0] + label
            structure += inner[2] + 2
            lengths.append(inner[1] + label)
        total += around
        structure += around
        critical += around + max(lengths)
    return total, critical, structure


def test_all_pass_and_come_back_as_they_were(
    tmp_path: Path, real_scripts: list[Script], real_texts: dict[str, str], qwen3_folder: Path
) -> None:
    run = Run(tmp_path, real_scripts)
    with AnthropicServer(real_scripts) as server:
        result = run(server, tokenizer_model=str(qwen3_folder))
    assert result.tally.passed == len(real_texts) and result.stopped is None
    assert max(result.tally.distances) <= 0.2
    assert [row[PARALLEL] for row in run.rows] == list(real_texts.values())
    assert [row[SEQUENTIAL] for row in run.rows] == [script.text for script in real_scripts]
    preprocessed = preprocess_data(
        PreprocessConfig(
            input=str(run.output / "rows.jsonl"),
            output_prefix=str(tmp_path / "train"),
            tokenizer_model=str(qwen3_folder),
            workers=1,
        )
    )
    assert preprocessed.totals.documents == len(real_texts) and not preprocessed.totals.rejected
    assert preprocessed.totals.blocks == result.tally.kinds.total()


def test_statistics_are_those_of_the_published_files(real_texts: dict[str, str]) -> None:
    for name, text in real_texts.items():
        top, blocks, depth, paths, _, share, parallel = MEASURED[name]
        parts = parse_think(text)
        total, critical, structure = measured(parts)
        assert sum(isinstance(part, Block) for part in parts) == top
        assert total / critical == pytest.approx(parallel, rel=0.01), name
        assert structure / total == pytest.approx(share, abs=0.01), name
        statistics = measure(tree_document(parts, RoughTokens()))
        assert (statistics.blocks, statistics.depth, statistics.paths) == (blocks, depth, paths)


def test_the_gate_shortens_the_critical_path_and_keeps_the_text(real_texts: dict[str, str], qwen3_folder: Path) -> None:
    counter = TrainingTokens(build_tokenizer("HuggingFaceTokenizer", qwen3_folder), "qwen3")
    before = after = plain = 0
    for text in real_texts.values():
        parts = parse_think(text)
        left, _ = flatten_losing(parts, counter, 1.0)
        assert plain_text(left) == plain_text(parts)
        plain += count_plain(parts, counter)
        before += measure(tree_document(parts, counter)).critical_tokens
        own = measure(tree_document(left, counter)).critical_tokens
        assert own <= measure(tree_document(parts, counter)).critical_tokens
        after += own
    assert before / plain == pytest.approx(0.958, abs=0.001)
    assert after / plain == pytest.approx(0.925, abs=0.001)
