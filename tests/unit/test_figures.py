"""Figures that README.md and docs/*.md quote are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.figures_in_docs import LINK, ONLY_LINKED, STATEMENTS, missing
from benchmarks.quoted import source

ROOT = Path(__file__).parents[2]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", STATEMENTS)
def test_a_document_says_what_the_results_say(document: str) -> None:
    assert not missing(document, read(document)), "see python -m benchmarks.figures_in_docs"


@pytest.mark.parametrize("document", STATEMENTS)
def test_another_figure_is_noticed(document: str) -> None:
    wrong = re.sub(r"\d", lambda digit: str((int(digit.group()) + 1) % 10), read(document))
    assert len(missing(document, wrong)) == len(list(STATEMENTS[document]()))


def test_results_that_a_document_links_are_those_of_its_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    real = source.results
    for document in ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]:
        used: set[str] = set()
        monkeypatch.setattr(source, "results", lambda name, used=used: used.add(f"benchmarks/{name}") or real(name))
        list(STATEMENTS.get(document, lambda: iter(()))())
        linked = {name for name in LINK.findall(read(document)) if (document, name) not in ONLY_LINKED}
        assert linked <= used, f"{document}: add a statement to benchmarks/quoted/"
