"""The paper in miniature: trains small models of three kinds from nothing, and measures what the paper claims.

Parts: `lengths` (of right answers; needs no model), `train` (each GPU takes run after run, four at a time, and
evaluates each as it ends), `time` (wall clock, alone on one GPU), `report` (tables and figures from results/*.json);
without --part all of them. Whatever is finished in --output is not done again, so the same command goes on with a part
that was stopped.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from megatron_multiverse.errors import ConfigError, TrainingError

HERE = Path(__file__).parent
STOPPED = 3
"""Exit code of a run that a signal stopped; the same command goes on with it."""
Part = Literal["lengths", "train", "time", "report"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MiniatureOptions:
    """What is done."""

    part: Part | None = None
    """Only this part; by default all."""
    runs: list[str] = field(default_factory=list)
    """Only these runs of `settings.py`, in this order; by default all."""
    output: Path = HERE.parents[1] / "runs" / "paper_in_miniature"
    """Folder for models, training states and results."""
    minutes: float = 8.0
    """Time for the part that trains: then the runs under way are stopped with their state saved."""
    runs_per_gpu: int = 4
    """Runs at the same time on each GPU. So small a model leaves it idle between its kernels."""
    attention_backend: str = "auto"
    """Of training, as in `config/layers.py`."""
    smoke: bool = False
    """The three kinds at a size that a CPU does in a minute; the figures mean nothing then."""


def main() -> None:
    from megatron_multiverse.cli import parse_options

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_options(MiniatureOptions)
    (options.output / "models").mkdir(parents=True, exist_ok=True)
    (options.output / "results").mkdir(exist_ok=True)
    lengths = options.output / "results" / "lengths.json"
    if options.part in (None, "lengths") and not lengths.exists():
        from lengths import measure_lengths

        measure_lengths(lengths, 5 if options.smoke else 300)
    if options.part in (None, "train") and not train_all(options):
        return
    if options.part in (None, "time"):
        time_all(options)
    if options.part in (None, "report"):
        from paper_report import write_report

        write_report(options.output / "results", options.output / "report")


def train_all(options: MiniatureOptions) -> bool:
    """Train what is missing, `runs_per_gpu` processes on each GPU (or one on the CPU); returns whether nothing is
    missing now.

    Raises:
        ConfigError: there is no such run.
        TrainingError: a run failed.
    """
    import torch
    from settings import runs

    if unknown := [name for name in options.runs if name not in runs()]:
        raise ConfigError(f"--runs {unknown}: known are {', '.join(runs())}")
    names = options.runs or list(runs())[: 3 if options.smoke else None]
    waiting = [name for name in names if not (options.output / "results" / f"{name}.json").exists()]
    gpus = max(1, torch.cuda.device_count())
    places = gpus * options.runs_per_gpu if torch.cuda.is_available() else 1
    if waiting:
        logger.info(estimate(options, waiting, places))
    deadline = time.monotonic() + 60 * options.minutes
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    ended: dict[str, int] = {}
    is_late = False
    while running or (waiting and not is_late):
        for place in range(places):
            if place not in running and waiting and not is_late:
                name = waiting.pop(0)
                running[place] = name, start_run(options, name, place % gpus, places)
        for place, (name, process) in list(running.items()):
            if process.poll() is not None:
                del running[place]
                ended[name] = process.returncode
                logger.info("%s ended with exit code %d", name, process.returncode)
        if not is_late and time.monotonic() > deadline:
            is_late = True
            for _, process in running.values():
                process.terminate()  # the trainer saves its state
        time.sleep(0.2)
    failed = [name for name, code in ended.items() if code not in (0, STOPPED)]
    if failed and not is_late:
        logs = ", ".join(str(options.output / "results" / f"{name}.log") for name in failed)
        raise TrainingError(
            f"{len(failed)} runs failed; why stands at the end of {logs}. Then the same command goes on"
        )
    missing = [name for name, code in ended.items() if code] + waiting
    if missing:
        logger.info("not finished in time: %s; the same command goes on with them", ", ".join(missing))
    return not missing


def estimate(options: MiniatureOptions, waiting: list[str], places: int) -> str:
    """How long the missing runs will take: each as long as those that are done here, or by the rate in settings.py."""
    from settings import FULL, SMOKE

    size = SMOKE if options.smoke else FULL
    tokens = size.train_iters * size.rows * size.seq_length
    done = [json.loads(path.read_text(encoding="utf-8")) for path in (options.output / "results").glob("*-*.json")]
    times = [report["training_s"] + report["evaluation_s"] for report in done if report.get("training_s")]
    seconds, source = (median(times), "as those here took") if times else (tokens / size.tokens_per_s, "and evaluation")
    rounds = -(-len(waiting) // places)
    return (
        f"train: {len(waiting)} runs of {tokens:,} tokens are missing, {places} at once; "
        f"about {seconds:.0f} s each {source}, {rounds * seconds:.0f} s in all"
    )


def start_run(options: MiniatureOptions, name: str, device: int, places: int) -> subprocess.Popen[bytes]:
    """Start one of `places` runs in a process of its own, on one GPU; what it prints goes into results/NAME.log."""
    cores = len(os.sched_getaffinity(0))
    workers = 0 if options.smoke else max(1, min(4, cores // places - 1))
    command = [sys.executable, str(HERE / "one_run.py"), "--name", name, "--output", str(options.output)]
    command += ["--workers", str(workers), "--attention-backend", options.attention_backend]
    command += ["--smoke"] if options.smoke else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # each core has its process
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment["CUDA_VISIBLE_DEVICES"] = environment["CUDA_VISIBLE_DEVICES"].split(",")[device]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    logger.info("%s starts on device %d", name, device)
    with open(options.output / "results" / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def time_all(options: MiniatureOptions) -> None:
    """Wall clock of a Multiverse and a plain model, as far as it is not there yet: of each kind the one in models/ that
    answers most calculations right, since only answers that are right can be compared.

    Raises:
        TrainingError: there is none of a kind.
    """
    from answers import Answerer, Mode, time_alone, time_batches
    from settings import FULL, SMOKE, measured_on

    from megatron_multiverse.files import write_json_atomic

    parts = {"alone": time_alone, "batched": time_batches}
    missing = [name for name in parts if not (options.output / "results" / f"{name}.json").exists()]
    if not missing:
        return
    names = {kind: most_accurate(options, kind) for kind in ("multiverse", "plain")}
    size = SMOKE if options.smoke else FULL
    multiverse = Answerer(options.output / "models" / names["multiverse"], "multiverse", size)
    plain = Answerer(options.output / "models" / names["plain"], "plain", size)
    answerers: dict[Mode, Answerer] = {"parallel": multiverse, "one branch at a time": multiverse, "plain": plain}
    for name in missing:
        started = time.monotonic()
        modes = parts[name](answerers, size)
        report = {**measured_on(), "models": names, "modes": modes}
        logger.info("time: %s took %.0f s", name, time.monotonic() - started)
        write_json_atomic(options.output / "results" / f"{name}.json", report, indent=None)


def most_accurate(options: MiniatureOptions, kind: str) -> str:
    """Name of the evaluated model of a kind in models/ that answers most calculations right, the first of several.

    Raises:
        TrainingError: there is none.
    """
    from settings import SEEDS

    right = {}
    for name in (f"{kind}-{seed}" for seed in SEEDS):
        report = options.output / "results" / f"{name}.json"
        if report.exists() and (options.output / "models" / name).exists():
            sets = json.loads(report.read_text(encoding="utf-8"))["sets"]
            right[name] = sum(sum(found["right"]) for task, found in sets.items() if task.startswith("chains"))
    if not right:
        raise TrainingError(f"the wall clock needs a model of kind {kind}: train {kind}-0 first, with --part train")
    return max(right, key=right.__getitem__)


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
