"""How results are written: one JSON line per case, and a markdown table of all of them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.checkout import commit_here
from megatron_multiverse.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = ("gpu", "versions", "commit", "date", "command")
PACKAGES = ("torch", "triton", "flash-attn-4", "transformer-engine", "megatron-core")


def environment(commit: str | None = None, command: str | None = None) -> dict[str, Any]:
    """GPU, versions, commit, date and command of this run.

    Args:
        commit: commit of the code that runs, for a copy that is no git checkout. By default git says it, and "-dirty"
            is appended if tracked files differ.
        command: how this program was started, without its options; default `python -m benchmarks.kernels.NAME`.

    Raises:
        ConfigError: no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark needs a CUDA GPU, none is visible: run it on a machine that has one")
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions,
        "commit": commit or commit_here() or "",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join([command or f"python -m benchmarks.kernels.{Path(sys.argv[0]).stem}", *_arguments()]),
    }


def _arguments() -> list[str]:
    """The command line without the options that say where and under which commit results are written."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--output", "--commit"):
            next(words, None)
        else:
            kept.append(word)
    return kept


class Recorder:
    """Collects the rows of one benchmark and writes them as they come.

    Rows of earlier runs stay until a row of the same case, which is one with equal `key` fields, replaces them.
    """

    def __init__(
        self, name: str, folder: str | None, commit: str | None, *, key: tuple[str, ...], command: str | None = None
    ) -> None:
        self.key = key
        self.folder = Path(folder) if folder else RESULTS
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment(commit, command)
        self.stem = f"{name}_{self.environment['gpu'].replace('NVIDIA ', '').replace(' ', '_').lower()}"
        self.lines = self.folder / f"{self.stem}.jsonl"
        earlier = self.lines.read_text().splitlines() if self.lines.exists() else []
        self.records: dict[tuple[Any, ...], dict[str, Any]] = {}
        for record in map(json.loads, earlier):
            self.records[self._case(record)] = record

    def _case(self, record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record.get(name) for name in self.key)

    def add(self, **row: Any) -> None:
        """Record one measured case. Floats are measured values and keep four digits, as the clock does."""
        row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        self.records[self._case(row)] = row | self.environment
        self.lines.write_text("".join(json.dumps(record) + "\n" for record in self.records.values()))
        print(row, flush=True)

    def table(self, note: str) -> None:
        """Write all rows as a markdown table, with `note` above it and below it how each run was made."""
        rows = [{k: v for k, v in x.items() if k not in ENVIRONMENT or k == "commit"} for x in self.records.values()]
        columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "commit"] + ["commit"]
        lines = [self.environment["gpu"], "", note, ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in rows]
        runs = dict.fromkeys(
            f"- {x['commit']}, {x['date']}, {', '.join(f'{k} {v}' for k, v in x['versions'].items())}: `{x['command']}`"
            for x in self.records.values()
        )
        (self.folder / f"{self.stem}.md").write_text("\n".join([*lines, "", *runs]) + "\n")
