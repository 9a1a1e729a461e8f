"""tools/preprocess_data.py against the plain loop of Megatron's script: same tokenizer, rows, cores and run.

The rival is what Megatron-LM's tools/preprocess_data.py does: a multiprocessing.Pool tokenizes line by line, hands
the ids to the parent through pickle, and the parent adds them to megatron-core's IndexedDatasetBuilder. It checks
nothing; ours also checks the structure of every row and counts statistics. Both outputs are compared byte for byte.

    python benchmarks/bench_preprocess.py --trajectories FOLDER_OF_XML --megabytes 30 --workers 2
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiverse.cli import parse_options
from megatron_multiverse.data.readers import trajectory_files
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Compare docs/s and MB/s of preprocessing with a plain worker-pool loop over megatron-core's builder."""

    trajectories: str
    """Folder of trajectory files (*.xml, *.txt), repeated until the input is large enough."""
    tokenizer_type: str = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer."""
    tokenizer_model: str = ""
    """Tokenizer; empty trains a byte-level BPE with 16,000 tokens on the trajectories."""
    megabytes: int = 20
    """Size of the input."""
    workers: int = 2
    """Worker processes of both."""
    repeats: int = 3
    """Each is run so often, in turn; the fastest run counts."""
    rival_output: str = ""
    """Used by the script itself: run the rival only, write here."""


_tokenizer: MultiverseTokenizer


def _start_worker(tokenizer_type: str, tokenizer_model: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)


def _encode(line: str) -> tuple[list[int], list[int], int]:
    row = json.loads(line)
    ids: list[int] = []
    lengths = []
    for key in ("prompt", "response"):
        part = _tokenizer.tokenize(row[key])
        lengths.append(len(part))
        ids.extend(part)
    return ids, lengths, len(line)


def run_rival(config: BenchConfig) -> None:
    """Megatron's loop; prints the seconds it took without imports."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    started = time.monotonic()
    vocab_size = build_tokenizer(config.tokenizer_type, config.tokenizer_model).vocab_size
    with open(config.trajectories, encoding="utf-8") as stream:
        arguments = (config.tokenizer_type, config.tokenizer_model)
        with multiprocessing.Pool(config.workers, _start_worker, arguments) as pool:
            builder = IndexedDatasetBuilder(f"{config.rival_output}.bin", dtype=DType.optimal_dtype(vocab_size))
            documents: Any = pool.imap(_encode, stream, 32)
            for ids, lengths, _ in documents:
                builder.add_document(ids, lengths)
            builder.finalize(f"{config.rival_output}.idx")
    print(f"seconds {time.monotonic() - started}")


def _train_tokenizer(folder: Path, files: list[Path]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(file) for file in files], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def _write_input(path: Path, files: list[Path], megabytes: int) -> int:
    rows = [{"prompt": f"Problem {file.stem}", "response": file.read_text(encoding="utf-8")} for file in files]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    repeats = max(1, megabytes * 1_000_000 // len(lines))
    path.write_text(lines * repeats, encoding="utf-8")
    return len(rows) * repeats


def _run(command: list[str]) -> tuple[float, str]:
    started = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return time.monotonic() - started, done.stdout


def main() -> None:
    config = parse_options(BenchConfig)
    if config.rival_output:
        run_rival(config)
        return
    files = trajectory_files(Path(config.trajectories))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = config.tokenizer_model or _train_tokenizer(folder / "tokenizer", files)
        source = folder / "rows.jsonl"
        documents = _write_input(source, files, config.megabytes)
        shared = [
            "--tokenizer-type",
            config.tokenizer_type,
            "--tokenizer-model",
            model,
            "--workers",
            str(config.workers),
        ]
        ours, rival = str(folder / "ours"), str(folder / "rival")
        tool = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--output-prefix", ours, *shared]
        loop = [sys.executable, __file__, "--trajectories", str(source), "--rival-output", rival, *shared]
        best: dict[str, list[float]] = {"ours": [float("inf")] * 2, "rival": [float("inf")] * 2}
        for _ in range(config.repeats):
            for who, command in (("ours", tool), ("rival", loop)):
                Path(f"{ours}_manifest.json").unlink(missing_ok=True)  # or there would be nothing to do
                whole, output = _run(command)
                match = re.search(r"seconds ([\d.]+)|idx in ([\d.]+) s", output)
                assert match is not None, output
                inner = float(match[1] or match[2])
                best[who] = [min(best[who][0], inner), min(best[who][1], whole)]
        for suffix in (".bin", ".idx"):
            if Path(ours + suffix).read_bytes() != Path(rival + suffix).read_bytes():
                sys.exit(f"error: the {suffix} files differ")
        _print_table(best, documents, source.stat().st_size / 1e6)
    print(f"{config.workers} workers, {documents:,} documents; both outputs have the same bytes")


def _print_table(best: dict[str, list[float]], documents: int, megabytes: float) -> None:
    print(f"{'':44}{'seconds':>9}{'docs/s':>9}{'MB/s':>8}{'ratio':>8}")
    for column, what in enumerate(("loop, imports not counted", "whole command")):
        for who, label in (("ours", "tools/preprocess_data.py"), ("rival", "Pool + IndexedDatasetBuilder")):
            seconds = best[who][column]
            ratio = best["rival"][column] / seconds
            rate = f"{documents / seconds:>9,.1f}{megabytes / seconds:>8.2f}{ratio:>8.2f}"
            print(f"{label + ' (' + what.split(',')[0] + ')':<44}{seconds:>9.2f}{rate}")


if __name__ == "__main__":
    main()
