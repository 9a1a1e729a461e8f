"""The page of a sample, in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_multiverse.curation.inputs import PARALLEL, Sample
from megatron_multiverse.curation.trees import think, walk
from megatron_multiverse.curation.viewer import write_view
from megatron_multiverse.structure import Parts
from tests.unit.curation.random_trees import trajectory
from tests.waiting import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title='broken'</script> <!-- <b>x</b> & \u2028"


def page(folder: Path, parts: Parts) -> Path:
    blocks = [{"kind": "subtask", "depth": depth, "paths": 2, "net_gain": 1.5} for depth, _ in walk(parts)]
    statistics = {"num_tokens": 20, "critical_tokens": 10, "blocks": len(blocks), "paths": 2}
    curation = {"prompts": "abc", "distance": 0.1, "statistics": statistics, "plain_tokens": 15, "blocks": blocks}
    outcome = {"row": {PARALLEL: think(parts), "question": HOSTILE}, "curation": {**curation, "flattened": {}}}
    file = folder / "view.html"
    write_view(file, Sample("1", 1, f"original {HOSTILE}", {}), outcome, "tests")
    return file


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = page(tmp_path, trajectory(3)).read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    assert text.count("</script>") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_every_block_and_path(tmp_path: Path) -> None:
    parts = trajectory(3)
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page(tmp_path, parts).as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    assert "<title>Curated sample, row 1</title>" in dom
    blocks = [block for _, block in walk(parts)]
    assert dom.count('<details class="block"') == len(blocks)
    assert dom.count('<details class="path"') == sum(len(block.paths) for block in blocks)
    for block in blocks:
        assert block.conclusion.split("\n")[0] in dom
