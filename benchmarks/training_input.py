"""What a training step waits for before its forward pass: rows from the loader, and their layout on the device."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.model.device import to_device
from megatron_multiverse.training.microbatches import Microbatch, stream
from megatron_multiverse.training.placement import TokenPlacer

QUICKSTART = Path(__file__).parents[1] / "examples/quickstart"
TURNS = 10


def input_costs(placer: TokenPlacer, batch: Microbatch, step_s: float, *, workers: int = 2) -> dict[str, Any]:
    """Times and shares of a step, for a run whose steps take `step_s`.

    Args:
        placer: of the run.
        batch: one of its microbatches; the rows that are loaded have its length.
        step_s: seconds of a step.
        workers: processes of the loader.
    """
    scan_s = placing_seconds(placer, batch)
    with tempfile.TemporaryDirectory() as folder:
        wait_s = waiting_seconds(quickstart_rows(Path(folder), batch["input_ids"].shape[1], workers), step_s)
    return {
        "scan_ms": 1e3 * scan_s,
        "data_wait_ms": 1e3 * wait_s,
        "scan_and_data_share": (scan_s + wait_s) / step_s,
    }


def placing_seconds(placer: TokenPlacer, batch: Microbatch) -> float:
    """Median time until a microbatch is laid out on the device, its copy from the host included."""
    times = []
    for _ in range(TURNS):
        started = time.perf_counter()
        placer.place(batch, to_device(batch["input_ids"], placer.device))
        if placer.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def quickstart_rows(folder: Path, tokens: int, workers: int) -> SFTLoader:
    """A loader of the quickstart's rows, packed. They are short, so a row of it holds more documents than of most data.

    Args:
        folder: an empty one, for the data; it must stay while the loader is used.
        tokens: length of a packed row.
        workers: processes that parse and pack ahead of time.
    """
    model, rows = str(QUICKSTART / "model"), folder / "rows.jsonl"
    count = str(max(100, tokens // 100))  # about three packed rows: the loader repeats them
    command = [sys.executable, str(QUICKSTART / "generate_data.py"), "--output", str(rows), "--num-rows", count]
    subprocess.run(command, check=True)
    options: dict[str, Any] = {"tokenizer_model": model, "append_eod": True, "workers": 1}
    preprocess_data(PreprocessConfig(input=str(rows), output_prefix=str(folder / "set"), **options))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model)
    return SFTLoader(
        SFTDataset([str(folder / "set")], tokenizer.structure_vocab),
        seq_length=tokens,
        micro_batch_size=1,
        pad=tokenizer.pad,
        num_workers=workers,
        tail="continue",
        overlong="drop",
    )


def waiting_seconds(loader: SFTLoader, step_s: float) -> float:
    """Mean time that a step waits for its row, of steps after the first, while nothing else is done for `step_s`."""
    batches, waited = stream(loader), []
    try:
        for _ in itertools.repeat(None, TURNS + 1):
            started = time.perf_counter()
            next(batches)
            waited.append(time.perf_counter() - started)
            time.sleep(step_s)
    finally:
        batches.close()
    return statistics.mean(waited[1:])
