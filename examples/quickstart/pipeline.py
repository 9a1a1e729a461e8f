"""The training side of the quickstart: rows -> .bin/.idx -> training -> checkpoint -> resume -> loss curve.

Every stage is the tool a user would call, run as a process of its own and echoed as a command.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INTERRUPTED_AT, RESUME_CHECK_STEPS = 20, 40


def run_pipeline(folder: Path, *, train_iters: int, meanwhile: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Train a tiny model from nothing in `folder` (emptied first) and check that resuming changes no bit.

    Args:
        folder: rows, data, runs and loss.png go here.
        train_iters: steps of the run whose curve is drawn; more than RESUME_CHECK_STEPS.
        meanwhile: called on the second core once the interrupted run needs it no more.

    Returns:
        Figures for the report, those of `meanwhile` included.
    """
    empty(folder)
    prepare(folder, train_rows=12 * train_iters, held_out_rows=300)  # a step reads about eight
    straight, stopped = folder / "run", folder / "interrupted"
    with ThreadPoolExecutor(1) as other_core:
        output = other_core.submit(train_with_interruption, folder, stopped)
        others = other_core.submit(meanwhile)
        keep = ("--checkpoint.save_interval", RESUME_CHECK_STEPS, "--checkpoint.keep_last", 0)
        train(folder, straight, train_iters, *keep)
        print(f"\nAt the same time, on another core:\n{output.result()}")
    curve, resumed = losses(straight), losses(stopped)
    same = resumed == {step: loss for step, loss in curve.items() if step <= RESUME_CHECK_STEPS} and same_weights(
        straight / f"iter_{RESUME_CHECK_STEPS:07d}", stopped / "model"
    )
    print(f"straight run and resumed run at step {RESUME_CHECK_STEPS}: {'equal' if same else 'DIFFERENT'}")
    tool("tools/plot_loss.py", "--runs", straight, "--output", folder / "loss.png")
    first, last = curve[min(curve)], curve[max(curve)]
    return others.result() | {
        "train_iters": train_iters,
        "loss_first": first,
        "loss_last": last,
        "resume_bit_exact": same,
        "loss_curve": str(folder / "loss.png"),
    }


def prepare(folder: Path, *, train_rows: int, held_out_rows: int) -> None:
    """Write the rows of both splits and preprocess them."""
    for split, rows in (("train", train_rows), ("held_out", held_out_rows)):
        lines = folder / f"rows/{split}.jsonl"
        sizes = ("--num-rows", rows, "--max-depth", 1, "--max-expressions", 2)
        tool("examples/quickstart/generate_data.py", "--output", lines, "--split", split, *sizes, "--seed", 11)
        tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", HERE / "model")
        output = ("--output-prefix", folder / f"data/{split}")
        tool("tools/preprocess_data.py", "--input", lines, *output, *tokenizer, "--append-eod")


def train_with_interruption(folder: Path, run: Path) -> str:
    """Train to INTERRUPTED_AT, then start again to RESUME_CHECK_STEPS; returns what both starts printed."""
    with (folder / "interrupted.log").open("w+", encoding="utf-8") as log:
        for steps in (INTERRUPTED_AT, RESUME_CHECK_STEPS):
            train(folder, run, steps, log=log)
        log.seek(0)
        return log.read()


def train(folder: Path, run: Path, train_iters: int, *options: str | int, log: TextIO | None = None) -> None:
    """Train until `train_iters`, going on from the newest checkpoint in `run`."""
    splits = (("data_prefixes", "train"), ("valid_prefixes", "held_out"))
    data = [f"--data.{name}={json.dumps([str(folder / 'data' / split)])}" for name, split in splits]
    words = ("--checkpoint.save", run, "--train_iters", train_iters, "--data.tokenizer_model", HERE / "model", *options)
    tool("pretrain_scripts/sft_multiverse.py", "--config", HERE / "tiny_cpu.yaml", *data, *words, log=log)


def tool(script: str, *arguments: str | Path | int, log: TextIO | None = None) -> None:
    """Run one of the repository's scripts, one word per argument; its output goes to ours, or into `log`.

    Raises:
        RuntimeError: the script failed.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ python {shlex.join([script, *words])}".replace(f"{ROOT}/", ""), flush=True, file=log)
    # One thread: with matrices this small a second one gains little, and loses much where the cores are busy.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *words]
    finished = subprocess.run(
        command, check=False, cwd=ROOT, env=one_thread, stdout=log, stderr=subprocess.STDOUT if log else None
    )
    if finished.returncode:
        where = f"in {log.name}" if log else "above"
        raise RuntimeError(f"{script} ended with exit code {finished.returncode}; its message stands {where}")


def convert_model(source: Path, folder: Path) -> Path:
    """Convert a Hugging Face folder to a megatron-core checkpoint in `folder` (emptied first); returns its place."""
    empty(folder)
    target = folder / "model"
    tool("tools/convert_checkpoint.py", "--from", "hf", "--to", "mcore", "--load", source, "--save", target)
    return target


def empty(folder: Path) -> None:
    """Make the folder anew; only one that this function has made before is deleted.

    Raises:
        RuntimeError: anything else stands there.
    """
    mark = folder / ".made_by_quickstart"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise RuntimeError(f"{folder} was not made by the quickstart: delete it yourself, or choose another --output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, bit for bit."""
    import torch

    from megatron_multiverse.checkpoints.load import load_checkpoint
    from megatron_multiverse.model.weights import weight_state

    ours, theirs = (weight_state(load_checkpoint(folder)[0]) for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, as logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
