"""The commands of README.md run as written, in a copy of the repository."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.forked import run_forked

ROOT = Path(__file__).parents[2]
PYTHON = ".venv/bin/python"
FENCE = re.compile(r"^```(?:\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Shell lines of the fenced blocks, continued lines joined."""
    blocks = "".join(FENCE.findall(text)).replace("\\\n", " ")
    return [line.strip() for line in blocks.splitlines() if line.strip()]


def python_commands() -> list[str]:
    return [line for line in commands((ROOT / "README.md").read_text(encoding="utf-8")) if line.startswith(PYTHON)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository by links, with a runs/ of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in {"runs", ".git"}:
            (folder / entry.name).symlink_to(entry)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == PYTHON
    return run_forked(*words[1:], cwd=folder, timeout=600)


def test_every_command_runs_in_the_order_written(checkout: Path) -> None:
    found = python_commands()
    assert {shlex.split(command)[1] for command in found} >= {
        "tools/generate.py",
        "tools/preprocess_data.py",
        "pretrain_scripts/sft_multiverse.py",
        "tools/plot_loss.py",
    }
    for command in found:
        done = run(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    again = next(command for command in found if "sft_multiverse.py" in command)
    longer = re.sub(r"--train_iters (\d+)", lambda match: f"--train_iters {int(match[1]) + 2}", again)
    assert longer != again
    done = run(longer, checkout)
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr[-4000:]
    assert "learning rate schedule differs" not in done.stderr, "README promises: it goes on bit for bit"
    folder = Path(shlex.split(again)[shlex.split(again).index("--checkpoint.save") + 1])
    steps = [json.loads(line) for line in (checkout / folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["resumed"] for row in steps if row["kind"] == "start"] == [False, True]


def test_commands_are_found_in_fences_alone_and_joined() -> None:
    text = "`a`\n```\nmake x\n.venv/bin/python a.py --b \\\n  c\n```\n.venv/bin/python outside\n```sh\nd\n```\n"
    assert [" ".join(line.split()) for line in commands(text)] == ["make x", ".venv/bin/python a.py --b c", "d"]
