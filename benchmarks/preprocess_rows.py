"""What bench_preprocess.py feeds to all contestants: rows of real or generated text, and a tokenizer."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_multiverse.data.input_files import trajectory_files
from megatron_multiverse.structure import TAGS

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
_BYTES_PER_GENERATED_ROW = 1450
_TEXT_SUFFIXES = (".md", ".rst", ".txt", ".py")
_STRUCTURE = re.compile("((?:" + "|".join(map(re.escape, TAGS)) + r")(?:\n[0-9.]+:)?)")


def train_tokenizer(folder: Path, trajectories: Path) -> str:
    """A byte-level BPE with 16,000 tokens, trained on the trajectories; returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(file) for file in trajectory_files(trajectories)], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


class _Words:
    """Hands out the text of a folder of files, piece by piece."""

    def __init__(self, folder: Path) -> None:
        files = sorted(file for file in folder.rglob("*") if file.suffix in _TEXT_SUFFIXES)
        self._texts: Iterator[str] = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
        self._text, self._place = "", 0

    def take(self, count: int) -> str:
        while len(self._text) - self._place < count:
            try:
                self._text, self._place = self._text[self._place :] + next(self._texts), 0
            except StopIteration:
                raise SystemExit("--texts holds too little text for --megabytes") from None
        self._place += count
        return self._text[self._place - count : self._place].replace("<", "(").strip() or "empty"


def _with_words(text: str, words: _Words) -> str:
    """The same structure around other text of the same length."""
    parts = _STRUCTURE.split(text)
    for k in range(0, len(parts), 2):
        if core := parts[k].strip():
            before, _, after = parts[k].partition(core)
            parts[k] = before + words.take(len(core)) + after
    return "".join(parts)


def write_rows(path: Path, trajectories: Path, words_from: Path | None, megabytes: int) -> int:
    """Write trajectories, over and over, as rows.

    Args:
        path: where to.
        trajectories: folder of trajectory files.
        words_from: folder of text files whose words replace those of the trajectories; None keeps them.
        megabytes: when to stop.

    Returns:
        The number of rows.
    """
    texts = [(file.stem, file.read_text(encoding="utf-8")) for file in trajectory_files(trajectories)]
    words = _Words(words_from) if words_from else None
    count = size = 0
    with open(path, "w", encoding="utf-8") as out:
        for name, text in itertools.cycle(texts):
            row = {"prompt": f"Problem {name}", "response": _with_words(text, words) if words else text}
            size += out.write(json.dumps(row) + "\n")
            count += 1
            if size >= megabytes * 1_000_000:
                break
    return count


def generate_rows(path: Path, megabytes: int) -> int:
    """Write rows of the quickstart; returns how many."""
    rows = megabytes * 1_000_000 // _BYTES_PER_GENERATED_ROW
    script = [sys.executable, str(QUICKSTART / "generate_data.py"), "--output", str(path), "--num-rows", str(rows)]
    subprocess.run(script, check=True, capture_output=True)
    return rows
