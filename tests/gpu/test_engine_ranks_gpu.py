"""The engine over two GPUs writes what it writes on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
PROMPTS = [
    "Work out A = 583 + 967; B = (48 + 76) - (13 * 4). Think step by step and in parallel before answering.",
    "Work out A = 12 * 9; B = 77 - 18; C = 31 + 54. Think step by step and in parallel before answering.",
]


def generate(folder: Path, tensor: int, pipeline: int, *options: str) -> list[dict[str, Any]]:
    """The records of the quickstart model's answers over so many ranks."""
    prompts, records = folder / "prompts.jsonl", folder / f"records_{tensor}_{pipeline}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    ranks = tensor * pipeline
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    sizes = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
    files = ["--input", str(prompts), "--output", str(folder / "answers.jsonl"), "--records", str(records)]
    tool = [str(ROOT / "tools/generate.py"), "--load", str(ROOT / "examples/quickstart/model")]
    subprocess.run([sys.executable, *start, *tool, *sizes, *files, *options], check=True, cwd=ROOT, timeout=300)
    return [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("tensor", "pipeline", "fused"), [(2, 1, "0"), (2, 1, "1"), (1, 2, "0")])
def test_two_gpus_answer_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: int, pipeline: int, fused: str
) -> None:
    """In float32, where no two tokens tie: forks and joins, by CUDA graphs under tensor parallelism."""
    monkeypatch.setenv("MULTIVERSE_FUSED_SUMS", fused)
    options = ("--dtype", "float32", "--device", "cuda")
    want, got = generate(tmp_path, 1, 1, *options), generate(tmp_path, tensor, pipeline, *options)
    assert [record["token_ids"] for record in got] == [record["token_ids"] for record in want]
    for mine, reference in zip(got, want, strict=True):
        assert mine["logprobs"] == pytest.approx(reference["logprobs"], abs=1e-3)
    assert any(record["blocks"] for record in want)
