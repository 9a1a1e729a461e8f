"""One sample as a page of its own: the original beside the tree, foldable, in one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_multiverse.curation.inputs import PARALLEL, Sample
from megatron_multiverse.curation.trees import parse_think
from megatron_multiverse.files import write_text_atomic
from megatron_multiverse.structure import Block, Parts


def write_view(file: Path, sample: Sample, outcome: dict[str, Any], made_by: str) -> None:
    """Write the page.

    Args:
        file: where it goes.
        sample: the original.
        outcome: the finished row with its details.
        made_by: the label of the provider.
    """
    row, curation = outcome["row"], outcome["curation"]
    statistics = curation["statistics"]
    facts = {
        "made by": made_by,
        "prompts": curation["prompts"],
        "distance": f"{curation['distance']:.3f}",
        "blocks": statistics["blocks"],
        "paths": statistics["paths"],
        "# parallel": f"{statistics['num_tokens'] / statistics['critical_tokens']:.2f}",
        "steps / plain text": f"{statistics['critical_tokens'] / curation['plain_tokens']:.3f}",
        "turned back into text": sum(curation["flattened"].values()),
    }
    write_page(
        file,
        title=f"Curated sample, row {sample.row}",
        question=str(row.get("question", row.get("prompt", ""))),
        original=sample.chain,
        parts=parse_think(row[PARALLEL] if PARALLEL in row else row["response"]),
        blocks=curation["blocks"],
        facts=facts,
    )


def write_page(
    file: Path,
    *,
    title: str,
    question: str,
    original: str,
    parts: Parts,
    blocks: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Write a page with a text beside its tree.

    Args:
        file: where it goes.
        title: of the page.
        question: what the text answers.
        original: the text on the left.
        parts: the tree on the right.
        blocks: `kind` (may be empty) and `net_gain` of each block, outer before inner, in text order.
        facts: name -> value, shown above both.
    """
    data = {
        "title": title,
        "question": question,
        "original": original,
        "tree": _tree(parts),
        "blocks": list(blocks),
        "facts": dict(facts),
    }
    # "</" would end the script element, wherever it stands in a string.
    embedded = json.dumps(data).replace("</", "<\\/").replace("<!--", "<\\!--")
    page = resources.files(__package__).joinpath("viewer.html").read_text(encoding="utf-8")
    write_text_atomic(file, page.replace("/*DATA*/null", embedded))


def _tree(parts: Parts) -> list[Any]:
    return [part if isinstance(part, str) else _block(part) for part in parts]


def _block(block: Block) -> dict[str, Any]:
    return {
        "outlines": list(block.outlines),
        "paths": [_tree(path) for path in block.paths],
        "conclusion": block.conclusion,
    }
