"""tools/convert_checkpoint.py on a synthetic 7B-shaped model, beside a plain copy of the same files in the same run.

Writes random bf16 weights in Qwen2.5-7B's shape as safetensors (shard by shard), converts them to megatron-core's
torch_dist and back, each command in a process of its own, copies the files right before each, and compares the way
back bit by bit with the original. Then it kills a conversion halfway and lets it continue. Files are evicted from the
page cache before every step, and every step ends with its output flushed to the disk. Needs four times the model's
size free; cleans up.

    python benchmarks/bench_convert.py --folder /scratch/bench
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the tool does; before torch

import torch

from megatron_multiverse.checkpoints.formats.hf_config import model_config_to_hf
from megatron_multiverse.checkpoints.formats.hf_safetensors import HFReader, write_index, write_safetensors
from megatron_multiverse.checkpoints.manifest import MANIFEST_FILE
from megatron_multiverse.checkpoints.names.registry import FAMILIES
from megatron_multiverse.checkpoints.names.table import entries
from megatron_multiverse.checkpoints.protocols import entry_bytes, group
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.files import flush
from megatron_multiverse.model.families import qwen2

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Speed and memory of checkpoint conversion beside a plain copy of the files."""

    folder: str
    """Scratch folder; what is made there is deleted at the end."""
    num_layers: int = 28
    """Layers; 28 is the 7B model (15.2 GB)."""
    tensor_model_parallel_size: int = 1
    """Tensor parallel size of the megatron-core side."""
    output: str = ""
    """Write the figures here as JSON."""


def make_model(folder: Path, num_layers: int) -> int:
    """Random weights in shards of up to 4 GB, as models are published; returns their bytes."""
    config = qwen2(
        num_layers=num_layers, hidden_size=3584, ffn_hidden_size=18944, num_attention_heads=28, num_query_groups=4,
        vocab_size=152064, max_sequence_length=32768, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    family = FAMILIES["qwen2"]
    plan = entries(family, config)
    sizes = [entry_bytes(entry, torch.bfloat16) for entry in plan]
    shards = list(group(plan, sizes, 4 * 10**9))
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 26, generator=generator).bfloat16()

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers of the pool from a random place on; drawing each anew would take minutes."""
        count, start = torch.Size(shape).numel(), int(torch.randint(len(pool), (), generator=generator))
        return pool.roll(-start).repeat(-(-count // len(pool)))[:count].reshape(shape)

    folder.mkdir(parents=True)
    for k, shard in enumerate(shards, 1):
        shapes = {name: shape for entry in shard for name, shape in entry.hf}
        write_safetensors(
            folder / f"model-{k:05d}-of-{len(shards):05d}.safetensors",
            {name: (torch.bfloat16, shape) for name, shape in shapes.items()},
            ((name, random(shape)) for name, shape in shapes.items()),
        )
    write_index(folder, [name for entry in plan for name, _ in entry.hf])
    (folder / "config.json").write_text(json.dumps(model_config_to_hf(config, family)))
    return sum(sizes)


def evict(folder: Path) -> None:
    """Flush all files and drop them from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            flush(file)
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Time of a plain copy of all files, flushed."""
    evict(source)
    start = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        flush(target / file.name)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(load: Path, save: Path, *options: str, stop: Callable[[], bool] | None = None) -> tuple[float, float]:
    """Run the tool; returns seconds and the peak of its resident memory in GiB. `stop` decides when to kill it."""
    command = [sys.executable, str(TOOL), "--load", str(load), "--save", str(save), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    while stop is not None and process.poll() is None:
        if stop():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, -signal.SIGKILL if stop else 0):
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def differences(a: Path, b: Path) -> int:
    """Number of tensors that are not bit-equal."""
    first, second = HFReader(a), HFReader(b)
    names = first.names() | second.names()
    return sum(not torch.equal(first.read(n).view(torch.int16), second.read(n).view(torch.int16)) for n in names)


def killed_halfway(source: Path, save: Path, options: list[str]) -> dict[str, Any]:
    """Kill a conversion when half of its units are finished, run it again, and see what was done twice."""
    partial = save.with_name(save.name + ".partial")
    manifest, half = partial / MANIFEST_FILE, len(list(source.glob("*.safetensors")))

    def finished() -> int:
        return max(len(manifest.read_text().splitlines()) - 1, 0) if manifest.is_file() else 0

    convert(source, save, *options, stop=lambda: finished() >= half)
    done = finished()
    stamps = {f.name: f.stat().st_mtime_ns for f in (partial / "release").glob("*.distcp")}
    kept = {f"__0_{k}.distcp" for k in range(done)}
    seconds, _ = convert(source, save, *options)
    again = [n for n in sorted(kept) if (save / "release" / n).stat().st_mtime_ns != stamps[n]]
    units = len(list((save / "release").glob("__0_[0-9]*.distcp")))
    return {"finished_before_kill": done, "units": units, "finished_units_done_again": len(again), "seconds": seconds}


def main() -> None:
    config = parse_options(BenchConfig)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=False)
    try:
        result = run(config, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    if config.output:
        Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


def run(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """All steps."""
    hf, mcore, back = folder / "hf", folder / "mcore", folder / "back"
    size = make_model(hf, config.num_layers) / 1e9
    to_mcore = ["--from", "hf", "--to", "mcore"]
    to_mcore += ["--tensor-model-parallel-size", str(config.tensor_model_parallel_size)]
    result: dict[str, Any] = {"gigabytes": round(size, 2)}
    for name, load, save, options in [
        ("hf_to_mcore", hf, mcore, to_mcore),
        ("mcore_to_hf", mcore, back, ["--from", "mcore", "--to", "hf"]),
    ]:
        copied = size / copy_seconds(hf, folder / "copy")
        evict(folder)
        seconds, memory = convert(load, save, *options)
        rate = size / seconds
        result[name] = {
            "seconds": round(seconds, 1),
            "gb_per_s": round(rate, 3),
            "copy_gb_per_s": round(copied, 3),
            "ratio_to_copy": round(rate / copied, 3),
            "peak_rss_gib": round(memory, 2),
        }
    result["tensors_that_differ"] = differences(hf, back)
    shutil.rmtree(mcore)
    shutil.rmtree(back)
    result["killed_halfway"] = killed_halfway(hf, folder / "resumed", to_mcore)
    convert(folder / "resumed", back, "--from", "mcore", "--to", "hf")
    result["tensors_that_differ_after_resume"] = differences(hf, back)
    return result


if __name__ == "__main__":
    run_tool(main)
