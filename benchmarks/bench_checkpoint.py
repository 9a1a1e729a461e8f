"""How long a training run stands still for a checkpoint: one that it waits for, and one written beside the next steps.

    python -m benchmarks.bench_checkpoint --folder SCRATCH
    python -m benchmarks.bench_checkpoint --folder SCRATCH --device cuda --model qwen2.5-7b --num-layers 2 \
        --tokens 8192 --interval 300

Trains a fresh model, by default of 110 million parameters on the CPU, with and without `checkpoint.async_save`, in
turns, and reads from metrics.jsonl what the second checkpoint of a run cost, and where its time went; the first one
makes memory that later ones find, and is given apart (`first_...`). Beside it stand a step before it and the one after
it, while files are written: writers take cores, too, and pages that training changes meanwhile are copied. In
`plain_write_s` the disk takes the same bytes without any checkpoint around them. All that is written is deleted.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.kernels.cases import TAG_IDS
from benchmarks.training_rows import PackedRows
from megatron_multiverse.checkout import commit_here
from megatron_multiverse.checkpoints.run_files import METRICS_FILE
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import ModelConfig, TrainConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.files import write_json_atomic
from megatron_multiverse.model.families import preset
from megatron_multiverse.training.trainer import train

PHASES = ("begin_s", "gather_s", "plan_s", "copy_s", "fork_s", "write_s", "finish_s")
"""Parts of a save, see `training.saver.Saver`."""
PIECE = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    folder: str
    """Scratch folder on the disk to be measured; two runs at a time lie there."""
    rounds: int = 3
    """Runs of each kind and engine."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What trains; float32 on the CPU, bf16 on a GPU."""
    model: str | None = None
    """A published shape at its full width, model/families.py lists them; default a small one, 768 wide."""
    num_layers: int = 12
    """Layers of it."""
    vocab_size: int = 32768
    """Ids of it."""
    tokens: int = 128
    """Tokens of a step."""
    interval: int = 6
    """Steps between two checkpoints, at least 3: so many that one is written before the next begins."""
    output: str = ""
    """Write the figures here as JSON."""
    commit: str = ""
    """Commit to record; default that of the working tree."""

    def __post_init__(self) -> None:
        if self.interval < 3:
            raise ConfigError(f"interval must be at least 3, got {self.interval}: steps before a checkpoint are timed")


def shape(o: Options) -> ModelConfig:
    """The model to train."""
    published = preset(o.model) if o.model else ModelConfig(
        num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12, num_query_groups=12,
        kv_channels=64, vocab_size=32768, max_sequence_length=128, share_embeddings_and_output_weights=True,
    )  # fmt: skip
    return dataclasses.replace(
        published, num_layers=o.num_layers, vocab_size=o.vocab_size, max_sequence_length=o.tokens
    )


def run(o: Options, engine: str, is_async: bool) -> dict[str, Any]:
    """Train, and say what its checkpoints cost, in seconds.

    Raises:
        ConfigError: a checkpoint written beside the training was not done when the next one began, so that its waiting
            tells nothing.
    """
    folder = Path(o.folder) / f"{engine}_{'beside' if is_async else 'waiting'}"
    config = TrainConfig.from_dict(
        {
            "model": dataclasses.asdict(shape(o)),
            "data": {"data_prefixes": ["none"], "seq_length": o.tokens},
            "checkpoint": {"save": str(folder), "save_interval": o.interval, "keep_last": 1, "async_save": is_async},
            "log": {"log_interval": 1}, "train_iters": 3 * o.interval - 1, "engine": engine, "device": o.device,
            "dtype": "bf16" if o.device == "cuda" else "float32",
        }
    )  # fmt: skip
    train(config, PackedRows("packed", o.tokens, TAG_IDS[0], 0, 1))
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    files = list(folder.glob("iter_*/*"))
    size, parts = sum(file.stat().st_size for file in files), sum(file.suffix == ".distcp" for file in files)
    shutil.rmtree(folder)
    first, second, _ = [row for row in rows if row["kind"] == "checkpoint"]
    for row in (first, second) if is_async else ():
        steps_beside = sum(
            other["kind"] == "train" and other["step"] > row["step"] for other in rows[: rows.index(row)]
        )
        if steps_beside >= o.interval - (row is second):
            raise ConfigError(
                f"the checkpoint of step {row['step']} took {row['save_s']:.1f} s and was not written when the next "
                f"one began: its waiting says nothing; raise --interval above {o.interval}"
            )
    steps = {row["step"]: row["step_time_s"] for row in rows if row["kind"] == "train"}
    return {
        "engine": engine,
        "async_save": is_async,
        "parameters": rows[0]["parameters"],
        "gigabytes": size / 1e9,
        "files": parts,
        **{name: second[name] for name in ("wait_s", "save_s", *PHASES)},
        **{f"first_{name}": first[name] for name in ("wait_s", "save_s", *PHASES)},
        "step_s": statistics.median(steps[number] for number in range(2, o.interval + 1)),
        "next_step_s": steps[2 * o.interval + 1],
    }


def plain_write(folder: Path, size: int, files: int) -> float:
    """Seconds in which the disk takes `size` bytes in so many files at a time, from memory that is there already."""
    piece = os.urandom(PIECE)

    def write(number: int) -> None:
        with open(folder / f"plain_{number}", "wb", buffering=0) as stream:
            for place in range(0, size // files, PIECE):
                stream.write(memoryview(piece)[: size // files - place])
            os.fsync(stream.fileno())

    started = time.perf_counter()
    with ThreadPoolExecutor(files) as pool:
        list(pool.map(write, range(files)))
    took = time.perf_counter() - started
    for number in range(files):
        (folder / f"plain_{number}").unlink()
    return took


def measure(o: Options) -> dict[str, Any]:
    """All runs, and for each kind the medians."""
    kinds = [(engine, is_async) for engine in ("one_process", "megatron") for is_async in (False, True)]
    runs, plain = [], []
    for _ in range(o.rounds):
        runs += [run(o, *kind) for kind in kinds]
        plain.append(plain_write(Path(o.folder), int(1e9 * runs[-1]["gigabytes"]), runs[-1]["files"]))
    placeholders = {o.folder: "SCRATCH", o.output: "OUTPUT"}
    arguments = [placeholders.get(argument, argument) for argument in sys.argv[1:]]
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": o.commit or commit_here() or "",
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if o.device == "cuda" else None,
        "torch": torch.__version__,
        "command": shlex.join(["python", "-m", "benchmarks.bench_checkpoint", *arguments]),
        "parameters": runs[0]["parameters"],
        "gigabytes": runs[0]["gigabytes"],
        "files": runs[0]["files"],
        "plain_write_s": statistics.median(plain),
        "plain_write_s_runs": plain,
    }
    for engine, is_async in kinds:
        same = [row for row in runs if (row["engine"], row["async_save"]) == (engine, is_async)]
        names = [name for name in same[0] if name.endswith("_s")]
        values = {name: [row[name] for row in same] for name in names}
        medians = {name: statistics.median(value) for name, value in values.items()}
        found[f"{engine}_{'beside' if is_async else 'waiting'}"] = medians | {"wait_s_runs": values["wait_s"]}
    return found


def main() -> None:
    """Measure, print, and write if asked."""
    options = parse_options(Options)
    found = measure(options)
    print(json.dumps(found, indent=2))
    if options.output:
        write_json_atomic(options.output, found)


if __name__ == "__main__":
    run_tool(main)
