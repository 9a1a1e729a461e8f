"""tools/preprocess_data.py beside its rivals, whole commands in turns: same rows, tokenizer, cores and machine.

    ours          tools/preprocess_data.py
    before        the same of another checkout (`--before FOLDER`)
    encode_batch  `Tokenizer.encode_batch_fast` of the `tokenizers` library alone: no reading, no writing, no loading
    gigatoken     what Megatron-LM's tools/preprocess_data_fast.py does: gigatoken reads and encodes the file by itself,
                  on all cores, once for each column, and a loop adds the ids to megatron-core's IndexedDatasetBuilder
    megatron      what Megatron-LM's tools/preprocess_data.py does: worker processes tokenize line by line with
                  megatron-core's tokenizer class and hand the ids to the parent, which adds them to the same builder

Only ours checks the structure of every row and counts statistics. The outputs are compared byte for byte. With
`--texts` the words between the tags are replaced by text from those files, so that none repeats; without it the
trajectories are repeated, which flatters gigatoken's memory for words, in ours too.

    python -m benchmarks.bench_preprocess --trajectories FOLDER_OF_XML --texts FOLDER --megabytes 30 \\
        --tokenizer-model FOLDER --before ../old-checkout
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.preprocess_rows import QUICKSTART, generate_rows, train_tokenizer, write_rows
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import TokenizerType
from megatron_multiverse.data.tokenizers import build_tokenizer

ROOT = Path(__file__).parents[1]
_SMALL = 4  # the small input has this part of the rows; the difference to the whole shows the speed beyond start-up


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Compare preprocessing with its rivals, in seconds, bytes and memory."""

    trajectories: str = ""
    """Folder of trajectory files (*.xml, *.txt), repeated until the input is large enough; empty takes rows of the
    quickstart, whose texts are short and full of tags."""
    texts: str = ""
    """Folder of text files (*.md, *.rst, *.txt, *.py) whose words replace those of the trajectories."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer."""
    tokenizer_model: str = ""
    """Tokenizer; empty trains a byte-level BPE with 16,000 tokens on the trajectories (or takes the quickstart's)."""
    megabytes: int = 20
    """Size of the input."""
    workers: int = 2
    """Worker processes or threads, for all of them."""
    repeats: int = 3
    """How often each of them runs, in turn; the fastest run counts."""
    before: str = ""
    """Another checkout of this project, whose tools/preprocess_data.py runs too."""
    rivals: list[str] | None = None
    """Which rivals run; all that can if not given."""
    run: Literal["", "encode_batch", "gigatoken", "megatron"] = ""
    """Used by the script itself: run this one on the rows in --trajectories."""
    output: str = ""
    """Used by the script itself: where that one writes."""


_tokenizer: Any = None


def _start_worker(tokenizer_type: TokenizerType, tokenizer_model: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megatron.core.tokenizers import MegatronTokenizer

    library = "huggingface" if tokenizer_type == "HuggingFaceTokenizer" else "sentencepiece"
    _tokenizer = MegatronTokenizer.from_pretrained(tokenizer_model, metadata_path={"library": library})


def _encode(line: str) -> tuple[list[int], list[int]]:
    row = json.loads(line)
    parts = [_tokenizer.tokenize(row[key]) for key in ("prompt", "response")]
    return [token for part in parts for token in part], [len(part) for part in parts]


def run_megatron(config: BenchConfig) -> None:
    """The worker pool of Megatron's script."""
    builder = _builder(config)
    with open(config.trajectories, encoding="utf-8") as stream:
        arguments = (config.tokenizer_type, config.tokenizer_model)
        with multiprocessing.Pool(config.workers, _start_worker, arguments) as pool:
            documents: Any = pool.imap(_encode, stream, 32)
            for ids, lengths in documents:
                builder.add_document(ids, lengths)
            pool.close()
            pool.join()
    builder.finalize(f"{config.output}.idx")


def run_gigatoken(config: BenchConfig) -> None:
    """The plain loop around gigatoken's own reader."""
    import gigatoken
    import numpy as np

    builder = _builder(config)
    tokenizer = gigatoken.Tokenizer(config.tokenizer_model)
    columns = [
        tokenizer.encode_files(gigatoken.JsonlFileSource([config.trajectories], field=key))
        for key in ("prompt", "response")
    ]
    for prompt, response in zip(*columns, strict=True):
        builder.add_document(np.concatenate((prompt, response)), [len(prompt), len(response)])
    builder.finalize(f"{config.output}.idx")


def _builder(config: BenchConfig) -> Any:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    # The script asks the tokenizer for this; the rivals here need no second tokenizer for one number.
    vocab_size = int((Path(config.output).parent / "vocab_size").read_text())
    return IndexedDatasetBuilder(f"{config.output}.bin", dtype=DType.optimal_dtype(vocab_size))


def run_encode_batch(config: BenchConfig) -> None:
    """Prints the wall-clock and CPU seconds of the library's call alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(config.tokenizer_model) / "tokenizer.json"))
    with open(config.trajectories, encoding="utf-8") as stream:
        texts = [text for line in stream for text in json.loads(line).values()]
    wall = cpu = 0.0
    for start in range(0, len(texts), 256):
        batch = texts[start : start + 256]
        started, before = time.monotonic(), time.process_time()
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        wall, cpu = wall + time.monotonic() - started, cpu + time.process_time() - before
    print("alone", wall, cpu)


RUNS = {"encode_batch": run_encode_batch, "gigatoken": run_gigatoken, "megatron": run_megatron}


@dataclass(frozen=True)
class Measured:
    """Wall-clock and CPU seconds of all processes, and the largest process in MiB."""

    wall: float
    cpu: float
    largest: float

    def best(self, other: Measured) -> Measured:
        return Measured(min(self.wall, other.wall), min(self.cpu, other.cpu), max(self.largest, other.largest))


class CannotRunError(Exception):
    """A run failed; the message holds what it printed."""


def _command(who: str, config: BenchConfig, model: str, source: Path, output: Path) -> list[str]:
    options = ["--tokenizer-type", config.tokenizer_type, "--tokenizer-model", model, "--workers", str(config.workers)]
    if who in RUNS:
        options += ["--run", who, "--trajectories", str(source), "--output", str(output)]
        return [sys.executable, "-m", "benchmarks.bench_preprocess", *options]
    root = ROOT if who == "ours" else Path(config.before).resolve()
    options += ["--input", str(source), "--output-prefix", str(output)]
    return [sys.executable, str(root / "tools" / "preprocess_data.py"), *options]


def _measure(who: str, config: BenchConfig, model: str, source: Path, output: Path) -> Measured:
    for suffix in ("_manifest.json", ".bin", ".idx"):  # or there would be nothing to do
        Path(f"{output}{suffix}").unlink(missing_ok=True)
    root = Path(config.before).resolve() if who == "before" else ROOT
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    environment |= {"RAYON_NUM_THREADS": str(config.workers)}
    with open(f"{output}.log", "w+", encoding="utf-8") as log:
        command = _command(who, config, model, source, output)
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        wall, cpu = time.monotonic() - started, usage.ru_utime + usage.ru_stime
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        printed = log.read()
    if process.returncode:
        raise CannotRunError(f"{who} cannot run:\n{printed}")
    if who == "encode_batch":
        wall, cpu = map(float, printed.split("alone")[1].split())
    return Measured(wall, cpu, usage.ru_maxrss / 1024)


def _total_memory(config: BenchConfig, model: str, source: Path, output: Path) -> float:
    """MiB of parent and workers together at their highest; memory they share counts once."""
    import psutil

    Path(f"{output}_manifest.json").unlink(missing_ok=True)
    command = _command("ours", config, model, source, output)
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    highest = 0
    while process.poll() is None:
        total = 0
        for each in [process, *process.children()]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += each.memory_full_info().pss
        highest = max(highest, total)
        time.sleep(0.01)
    return highest / (1 << 20)


def _prepare(config: BenchConfig, folder: Path) -> tuple[str, int]:
    """Writes the rows and the tokenizer, tags included; returns the tokenizer and the number of rows."""
    source = folder / "rows.jsonl"
    if config.trajectories:
        trajectories, words_from = Path(config.trajectories), Path(config.texts) if config.texts else None
        model = config.tokenizer_model or train_tokenizer(folder / "tokenizer", trajectories)
        documents = write_rows(source, trajectories, words_from, config.megabytes)
    else:
        model = config.tokenizer_model or str(QUICKSTART / "model")
        documents = generate_rows(source, config.megabytes)
    with open(source, "rb") as stream:
        (folder / "small.jsonl").write_bytes(b"".join(itertools.islice(stream, documents // _SMALL)))
    tokenizer = build_tokenizer(config.tokenizer_type, model)
    (folder / "vocab_size").write_text(str(tokenizer.vocab_size))
    tokenizer.save(folder / "tagged")  # the tags are part of the files: the rivals need not add them
    is_folder = config.tokenizer_type == "HuggingFaceTokenizer"
    return str(folder / "tagged" if is_folder else folder / "tagged" / "tokenizer.model"), documents


def _rivals(config: BenchConfig) -> list[str]:
    can = ["before"] if config.before else []
    if config.tokenizer_type == "HuggingFaceTokenizer":
        can += ["encode_batch", *(["gigatoken"] if importlib.util.find_spec("gigatoken") else [])]
    return config.rivals or [*can, "megatron"]


def main() -> None:
    config = parse_options(BenchConfig)
    if config.run:
        RUNS[config.run](config)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, documents = _prepare(config, folder)
        whole, small = folder / "rows.jsonl", folder / "small.jsonl"
        turns = [("ours", whole), ("ours", small), *((who, whole) for who in _rivals(config))]
        turns += [("gigatoken", small)] if "gigatoken" in _rivals(config) else []
        best: dict[tuple[str, Path], Measured] = {}
        for turn in turns * config.repeats:
            try:
                measured = _measure(turn[0], config, model, turn[1], folder / f"{turn[0]}-{turn[1].stem}")
            except CannotRunError as error:
                if turn[0] == "ours":
                    raise
                print(error)  # gigatoken does not know every tokenizer
            else:
                best[turn] = measured.best(best.get(turn, measured))
        memory = _total_memory(config, model, whole, folder / "ours-rows")
        written = [who for who, source in best if source == whole and who != "encode_batch"]
        outputs = {who: [(folder / f"{who}-rows{end}").read_bytes() for end in (".bin", ".idx")] for who in written}
        differing = [who for who in written if outputs[who] != outputs["ours"]]
        sizes = {source: source.stat().st_size / 1e6 for source in (whole, small)}
    _print_table({who: measured for (who, source), measured in best.items() if source == whole}, sizes[whole])
    for who in ("ours", "gigatoken"):
        if (who, small) in best:
            seconds = best[who, whole].wall - best[who, small].wall
            print(f"{who}: {(sizes[whole] - sizes[small]) / max(seconds, 1e-9):.1f} MB/s beyond start-up")
    print(f"{config.workers} workers, {documents:,} documents; other bytes than ours: {', '.join(differing) or 'none'}")
    print(f"memory of ours: {memory:.0f} MiB in all processes together")


def _print_table(best: dict[str, Measured], megabytes: float) -> None:
    print(f"{megabytes:.1f} MB, whole commands (encode_batch: the call alone); ratio = ours / rival")
    print(f"{'':14}{'seconds':>9}{'MB/s':>8}{'ratio':>8}{'CPU s':>9}{'ratio':>8}{'largest process':>18}")
    ours = best["ours"]
    for who, measured in best.items():
        print(
            f"{who:14}{measured.wall:>9.2f}{megabytes / measured.wall:>8.2f}{ours.wall / measured.wall:>8.3f}"
            f"{measured.cpu:>9.2f}{ours.cpu / measured.cpu:>8.3f}{measured.largest:>14,.0f} MiB"
        )


if __name__ == "__main__":
    run_tool(main)
