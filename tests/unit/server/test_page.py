"""The page at `/`, in a real browser."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.server.browser import CHROMIUM, Page, browser
from tests.unit.server.running import Running, running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

NESTED = (
    "Work out A = 583 + 967; B = (48 + 76) - (13 * 4); C = 8264 - 5397. "
    "Think step by step and in parallel before answering."
)
SCREENSHOTS = os.environ.get("MULTIVERSE_SCREENSHOTS")
"""Folder in which to leave pictures, to look at."""


@pytest.fixture(scope="module")
def new_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Page]]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(new_page: Callable[[], Page]) -> Iterator[Page]:
    opened = new_page()
    yield opened
    opened.close()


def take(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(Path(SCREENSHOTS) / f"{name}.png")


def text(page: Page, id: str) -> str:
    return str(page.run(f"document.getElementById('{id}').textContent"))


def test_branches_grow_in_columns_and_fold_at_the_join(page: Page, server: Running) -> None:
    page.size(1280, 900)
    page.dark(False)
    page.open(server.url)
    page.run(f"at('prompt').value = {json.dumps(NESTED)}")
    with server.held_after(160):  # in the inner block
        page.press("Enter", ctrl=True)
        inner = "document.querySelectorAll('.path .path.open').length === 2"
        page.wait_for(f"{inner} && Number(at('total').textContent) > 300")
        assert page.run("document.querySelectorAll('#answer > details > .paths > .path').length") == 3
        assert int(text(page, "writing")) >= 2
        take(page, "page_live")
    page.wait_for("at('stop').disabled")
    assert text(page, "problem") == ""
    assert page.run("document.querySelectorAll('details[open]').length") == 0, "folded"
    assert text(page, "writing") == "0"
    assert "Answer: A = 1550; B = 72; C = 2867" in text(page, "answer")
    assert "<Path>" not in text(page, "answer")
    total, critical = int(text(page, "total")), int(text(page, "critical"))
    assert float(text(page, "parallel")) == pytest.approx(total / critical, abs=0.01) and total > 1.3 * critical
    recorded = page.run("recorded.at(-1)[1].choices[0].multiverse")
    assert recorded["critical_tokens"] == critical, "the page counts what the engine counts"
    take(page, "page_done")
    assert {url.removeprefix(server.url) for url in page.requests if not url.startswith("data:")} == {
        "/",
        "/v1/models",
        "/v1/chat/completions",
    }, "nothing from elsewhere"
    assert page.complaints == []
    server.wait_until_free()


def test_a_saved_stream_is_replayed_and_bad_files_are_refused(page: Page, server: Running) -> None:
    page.open(server.url)
    page.run(f"at('prompt').value = {json.dumps(NESTED)}; run()")
    page.wait_for("at('stop').disabled && Number(at('total').textContent) > 0")
    shown = text(page, "answer"), text(page, "total"), text(page, "critical")
    page.run("at('keep').checked = true; at('speed').value = '1000'; 0")
    page.run("replay(JSON.parse(JSON.stringify(recorded)))")
    page.wait_for("at('stop').disabled")
    assert (text(page, "answer"), text(page, "total"), text(page, "critical")) == shown
    assert page.run("document.querySelectorAll('details[open]').length") == 2, "kept open"
    page.dark(True)
    take(page, "page_replay_dark")
    page.size(420, 900)
    assert page.run("document.documentElement.scrollWidth") <= 420, "fits a narrow screen"
    take(page, "page_narrow")
    page.run(
        "const bag = new DataTransfer(); bag.items.add(new File(['{\"a\": 1}'], 'x.json'));"
        "at('file').files = bag.files; at('file').dispatchEvent(new Event('change')); 0"
    )
    page.wait_for("at('problem').textContent === 'this file is no saved stream'")


def test_escape_stops_and_frees(page: Page, server: Running) -> None:
    page.size(1280, 900)
    page.open(server.url)
    page.run(f"at('prompt').value = {json.dumps(NESTED)}")
    with server.held_after(60):  # too few for the whole answer
        page.run("run(); 0")
        page.wait_for("Number(at('total').textContent) > 20")
        page.press("Escape")
        page.wait_for("at('stop').disabled")
        server.wait_until_free()


def test_markup_in_answers_and_errors_is_only_text(page: Page, server: Running) -> None:
    page.open(server.url)
    chunk = {
        "choices": [{"index": 0, "delta": {"content": "<img src=x onerror=alert(1)>"}, "multiverse": {"branch": ""}}]
    }
    page.run(f"replay([[0, {json.dumps(chunk)}]])")
    page.wait_for("at('answer').textContent.includes('onerror')")
    assert page.run("document.querySelectorAll('#answer img').length") == 0
    page.run("at('tokens').value = '10000000'; run()")
    page.wait_for("at('problem').textContent.includes('10000000')")


def test_with_a_key(page: Page) -> None:
    with running(keys=["secret"]) as locked:
        page.open(locked.url)
        page.run("run()")
        page.wait_for("at('problem').textContent.includes('key')")
        page.run("at('key').value = 'secret'; at('tokens').value = '30'; run()")
        page.wait_for("at('stop').disabled && Number(at('total').textContent) > 0")
        assert text(page, "problem") == ""
