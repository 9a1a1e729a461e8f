"""Links between documents lead somewhere: to a file, and to a heading of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_multiverse.server.app import PATHS

ROOT = Path(__file__).parents[2]
FOLDERS = ("*.md", "docs/*.md", "examples/**/*.md", "kernels/**/*.md", "benchmarks/**/*.md")
DOCUMENTS = [document for pattern in FOLDERS for document in ROOT.glob(pattern)]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = HEADING.findall(CODE.sub("", document.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(CODE.sub("", document.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_decisions_are_all_in_the_table_before_them() -> None:
    table, first, rest = (ROOT / "docs/decisions.md").read_text(encoding="utf-8").partition("\n## 1. ")
    numbers = re.findall(r"^## (\d+)\.", first.lstrip("\n") + rest, re.MULTILINE)
    assert numbers[:2] == ["1", "2"] and set(numbers) == set(re.findall(r"\[(\d+)\]\(#", table))


def section_of(folder: Path, text: str) -> str:
    """What docs/code.md says of a folder and of the files in it, without the folders below that have sections."""
    for depth, name in enumerate(folder.parts):
        section = re.search(rf"^{'  ' * depth}{re.escape(name)}/(?!\w).*\n(?:{'  ' * depth} .*\n)*", text, re.MULTILINE)
        assert section is not None, f"docs/code.md has no section for {folder}"
        text = section[0]
    below = "  " * len(folder.parts)
    return re.sub(rf"^{below}\w+/.*\n(?:{below} .*\n)*", "", text, flags=re.MULTILINE)


def is_named(file: Path, text: str) -> bool:
    return (
        re.search(rf"(?<![\w/]){re.escape(file.name)}(?!\w)", section_of(file.parent.relative_to(ROOT), text))
        is not None
    )


def test_the_map_of_the_code_names_every_module() -> None:
    """Each in the section of its folder, but those of folders whose files are alike."""
    text = (ROOT / "docs/code.md").read_text(encoding="utf-8")
    package = ROOT / "megatron_multiverse"
    alike = {"formats", "names", "providers", "routes"}
    files = [file for file in package.rglob("*.py") if file.parent.name not in alike and file.name != "__init__.py"]
    assert len(files) > 100
    missing = [str(file.relative_to(package)) for file in files if not is_named(file, text)]
    assert not missing, f"name them in docs/code.md: {', '.join(missing)}"


def test_the_page_of_the_server_names_every_route() -> None:
    """A request to any other is told to look there."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    named = {re.sub(r"/NAME$", "/{name:path}", path) for path in re.findall(r"`(?:[A-Z]+ )?(/[\w/]*)`", page)}
    assert named >= PATHS
