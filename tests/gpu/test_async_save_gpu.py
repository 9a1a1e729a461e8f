"""Checkpoints of a run on a GPU that are written beside it: the copy, who reads it, and what reaches the files."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_multiverse.training.host_memory import HostMemory
from megatron_multiverse.training.trainer import train

from .test_training_gpu import Loader, config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def sources(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    table = torch.randn(3000, 1001, device="cuda")
    return [table, *table.chunk(2), table.t(), table.bfloat16(), torch.tensor(2.0, device="cuda"), table[:1]]


def test_copies_are_pinned_equal_and_seen_by_forked_processes() -> None:
    """Twice in the same memory, the second time with another content."""
    host = HostMemory()
    for seed in (0, 1):
        host.reuse()
        copies = [host.copy(tensor) for tensor in sources(seed)]
        host.wait()
        assert all(copy.is_pinned() for copy in copies)
        assert all(torch.equal(copy, source.cpu()) for copy, source in zip(copies, sources(seed), strict=True))
        wanted = [bytes(copy.flatten().view(torch.uint8).numpy()) for copy in copies]
        if (child := os.fork()) == 0:
            seen = [bytes(copy.flatten().view(torch.uint8).numpy()) for copy in copies]
            os._exit(0 if seen == wanted else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert host.size == sum(source.numel() * source.itemsize for source in sources(0))


def test_memory_can_be_pinned_again_after_it_was_given_back() -> None:
    for _ in range(3):
        host = HostMemory()
        copy = host.copy(torch.ones(1 << 20, device="cuda"))
        host.wait()
        assert copy.is_pinned() and bool((copy == 1).all())
        del host, copy
        gc.collect()
    torch.ones(1, device="cuda").sum().item()  # no error of CUDA is left behind


@pytest.mark.parametrize("engine", ["one_process", "megatron"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_files_are_those_of_a_run_that_waits(tmp_path: Path, engine: str, dtype: str) -> None:
    """Four steps change the weights on the GPU while files are written."""
    contents, phases = [], []
    for beside in (False, True):
        folder = tmp_path / str(beside)
        checkpoint: dict[str, Any] = {"save": str(folder), "save_interval": 4, "keep_last": 0, "async_save": beside}
        changes = {"engine": engine, "dtype": dtype, "train_iters": 12, "deterministic": True}
        train(config(folder, checkpoint=checkpoint, **changes), Loader())
        files = [file for pattern in ("*.distcp", "common.pt") for file in folder.glob(f"iter_*/{pattern}")]
        contents.append({str(file.relative_to(folder)): file.read_bytes() for file in files})
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        phases += [row for row in rows if row["kind"] == "checkpoint"]
    assert contents[0] == contents[1] and len(contents[0]) == 3 * 3
    assert len(phases) == 6 and all(row["copy_s"] > 0 and row["write_s"] > 0 for row in phases)
