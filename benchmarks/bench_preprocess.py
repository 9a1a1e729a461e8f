"""tools/preprocess_data.py against the plain loop of Megatron's script: same tokenizer, rows, cores and run.

The rival is what Megatron-LM's tools/preprocess_data.py does: a multiprocessing.Pool tokenizes line by line, hands
the ids to the parent through pickle, and the parent adds them to megatron-core's IndexedDatasetBuilder. It runs
twice: with megatron-core's tokenizer class, as in that script ("megatron"), and with ours ("pool"). It checks
nothing; ours also checks the structure of every row and counts statistics. The outputs are compared byte for byte.

    python benchmarks/bench_preprocess.py --trajectories FOLDER_OF_XML --megabytes 30 --workers 2
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import TokenizerType
from megatron_multiverse.data.input_files import trajectory_files
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.tokenizers import build_tokenizer

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
_BYTES_PER_GENERATED_ROW = 1450


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Compare docs/s and MB/s of preprocessing with a plain worker-pool loop over megatron-core's builder."""

    trajectories: str = ""
    """Folder of trajectory files (*.xml, *.txt), repeated until the input is large enough; empty takes rows of the
    quickstart, whose texts are short and full of tags."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer."""
    tokenizer_model: str = ""
    """Tokenizer; empty trains a byte-level BPE with 16,000 tokens on the trajectories (or takes the quickstart's)."""
    megabytes: int = 20
    """Size of the input."""
    workers: int = 2
    """Worker processes, for both of them."""
    repeats: int = 3
    """How often each of them runs, in turn; the fastest run counts."""
    run: Literal["all", "ours", "pool", "megatron"] = "all"
    """Used by the script itself: run one of them only, on the rows in --trajectories."""
    output: str = ""
    """Used by the script itself: where that one writes."""


_tokenizer: Any = None


def _start_worker(run: str, tokenizer_type: TokenizerType, tokenizer_model: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if run == "megatron":
        from megatron.core.tokenizers import MegatronTokenizer

        library = "huggingface" if tokenizer_type == "HuggingFaceTokenizer" else "sentencepiece"
        _tokenizer = MegatronTokenizer.from_pretrained(tokenizer_model, metadata_path={"library": library})
    else:
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


def run_ours(config: BenchConfig) -> None:
    """What tools/preprocess_data.py does once its command line is read."""
    preprocess_data(
        PreprocessConfig(
            input=config.trajectories,
            output_prefix=config.output,
            tokenizer_type=config.tokenizer_type,
            tokenizer_model=config.tokenizer_model,
            workers=config.workers,
        )
    )


def run_rival(config: BenchConfig) -> None:
    """What Megatron's script does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = build_tokenizer(config.tokenizer_type, config.tokenizer_model).vocab_size
    with open(config.trajectories, encoding="utf-8") as stream:
        arguments = (config.run, config.tokenizer_type, config.tokenizer_model)
        with multiprocessing.Pool(config.workers, _start_worker, arguments) as pool:
            builder = IndexedDatasetBuilder(f"{config.output}.bin", dtype=DType.optimal_dtype(vocab_size))
            documents: Any = pool.imap(_encode, stream, 32)
            for ids, lengths, _ in documents:
                builder.add_document(ids, lengths)
            builder.finalize(f"{config.output}.idx")
            pool.close()
            pool.join()


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


def _generate_input(path: Path, megabytes: int) -> int:
    rows = megabytes * 1_000_000 // _BYTES_PER_GENERATED_ROW
    script = [sys.executable, str(QUICKSTART / "generate_data.py"), "--output", str(path), "--num-rows", str(rows)]
    subprocess.run(script, check=True, capture_output=True)
    return rows


def _run_one(config: BenchConfig) -> None:
    """Prints wall-clock and CPU seconds (of all processes) without imports."""
    if config.run != "ours":  # imports are counted in the whole command only
        for name in ("megatron.core.datasets.indexed_dataset", "megatron.core.tokenizers", "transformers"):
            importlib.import_module(name)
    started, before = time.monotonic(), time.process_time()
    (run_ours if config.run == "ours" else run_rival)(config)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() - before + children.ru_utime + children.ru_stime
    print(f"seconds {time.monotonic() - started} {cpu}")


def _measure(who: str, config: BenchConfig, model: str, source: Path, output: Path) -> list[float]:
    """Seconds of the loop, CPU seconds of the loop, seconds of the whole command."""
    command = [sys.executable, __file__, "--run", who, "--trajectories", str(source), "--output", str(output)]
    command += ["--tokenizer-type", config.tokenizer_type, "--tokenizer-model", model, "--workers", str(config.workers)]
    started = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    whole = time.monotonic() - started
    wall, cpu = map(float, done.stdout.split("seconds ")[1].split())
    return [wall, cpu, whole]


def main() -> None:
    config = parse_options(BenchConfig)
    if config.run != "all":
        _run_one(config)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "rows.jsonl"
        if config.trajectories:
            files = trajectory_files(Path(config.trajectories))
            model = config.tokenizer_model or _train_tokenizer(folder / "tokenizer", files)
            documents = _write_input(source, files, config.megabytes)
        else:
            model = config.tokenizer_model or str(QUICKSTART / "model")
            documents = _generate_input(source, config.megabytes)
        tagged = folder / "tagged"  # the tags are part of the files: the rivals need not add them
        build_tokenizer(config.tokenizer_type, model).save(tagged)
        model = str(tagged if config.tokenizer_type == "HuggingFaceTokenizer" else tagged / "tokenizer.model")
        best = {who: [float("inf")] * 3 for who in ("ours", "pool", "megatron")}
        for _ in range(config.repeats):
            for who, seconds in best.items():
                Path(folder / "ours_manifest.json").unlink(missing_ok=True)  # or there would be nothing to do
                measured = _measure(who, config, model, source, folder / who)
                best[who] = [min(pair) for pair in zip(seconds, measured, strict=True)]
        outputs = {who: [Path(f"{folder / who}{suffix}").read_bytes() for suffix in (".bin", ".idx")] for who in best}
        differing = [who for who in best if outputs[who] != outputs["ours"]]
        _print_table(best, documents, source.stat().st_size / 1e6)
    print(f"{config.workers} workers, {documents:,} documents; other bytes than ours: {', '.join(differing) or 'none'}")


def _print_table(best: dict[str, list[float]], documents: int, megabytes: float) -> None:
    print(f"{'':40}{'seconds':>9}{'docs/s':>9}{'MB/s':>8}{'ours is faster by':>19}")
    for column, what in enumerate(("wall clock", "CPU, all processes", "whole command, imports")):
        for who, measured in best.items():
            seconds = measured[column]
            rate = f"{documents / seconds:>9,.1f}{megabytes / seconds:>8.2f}{seconds / best['ours'][column]:>19.2f}"
            print(f"{what:<28}{who:<12}{seconds:>9.2f}{rate}")


if __name__ == "__main__":
    run_tool(main)
