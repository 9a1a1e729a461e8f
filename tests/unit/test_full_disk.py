"""A disk that fills up, and Ctrl-C, at every place of everything that writes.

The system itself refuses the writes (a limit on the size of files), so that what torch, safetensors and megatron-core
write fails as on a full disk. Each time one line says which file, nothing half-written is taken for whole, and the same
call ends as if nothing had happened once there is room.
"""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.manifest import MANIFEST_FILE
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.errors import MultiverseError
from megatron_multiverse.evaluation.samples import Sample, SampleLog
from megatron_multiverse.training.checkpoint import begin_saving
from tests.unit.checkpoints.hf_folders import save_hf_model, save_tokenizer
from tests.unit.checkpoints.test_convert import tensors
from tests.unit.training.test_checkpoint import new_state
from tests.unit.training.test_run_folder import manager

Write = Callable[[Path], Callable[[], Any]]
"""Writes to a place; what it returns reads back what stands there."""


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within this block no file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    save_hf_model(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def mcore(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcore") / "model"
    convert_checkpoint(ConvertConfig(from_="hf", to="mcore", load=str(hf), save=str(folder)))
    return folder


def preprocessing(hf: Path) -> Write:
    rows = hf.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{k}", "response": "x y " * 80}) + "\n" for k in range(60)))
    rows.write_text(rows.read_text() + '{"prompt": "rejected", "response": "</Path>"}\n')

    def write(place: Path) -> Callable[[], Any]:
        options = {"tokenizer_model": str(hf), "workers": 1, "encoder": "tokenizers"}
        preprocess_data(PreprocessConfig(input=str(rows), output_prefix=str(place), **options))
        assert not Path(f"{place}.shards").exists()
        ends = (".bin", ".idx", "_manifest.json", "_rejected.jsonl")
        return lambda: {end: Path(f"{place}{end}").read_bytes() for end in ends}

    return write


def conversion(load: Path, from_: str, to: str, **options: Any) -> Write:
    def read(place: Path) -> dict[str, bytes]:
        assert not place.with_name(f"{place.name}.partial").exists() and not (place / MANIFEST_FILE).exists()
        folder = place
        if to == "mcore":
            folder = place.with_name(f"{place.name}_back")
            convert_checkpoint(ConvertConfig(from_="mcore", to="hf", load=str(place), save=str(folder)))
        small = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json")}
        return {name: tensor.numpy().tobytes() for name, tensor in tensors(folder).items()} | small

    def write(place: Path) -> Callable[[], Any]:
        if not place.exists():  # what has its name is whole
            convert_checkpoint(ConvertConfig(from_=from_, to=to, load=str(load), save=str(place), **options))
        return lambda: read(place)

    return write


def training() -> Write:
    state = new_state(0, True)

    def read(place: Path) -> tuple[int | None, set[str]]:
        with manager(place) as folder:
            return folder.start_step, {file.name for file in (place / "iter_0000000").iterdir()}

    def write(place: Path) -> Callable[[], Any]:
        folder = manager(place)
        folder.save(state, begin_saving)  # without the lock, which helpers of a failed save hold for a moment longer
        return lambda: read(place)

    return write


def samples() -> Write:
    numbers = dict.fromkeys(("tokens", "critical_tokens", "decode_steps", "blocks", "paths", "seed", "concurrency"), 0)
    facts: dict[str, Any] = {"text": "t" * 300, "finish_reason": "stop", "malformed": {}, "seconds": 0.0, "task": "t"}
    facts |= {
        "thinking": "none",
        "budget": None,
        "gold": "1",
        "answer": None,
        "correct": False,
        "prompt": "p",
    } | numbers

    def write(place: Path) -> Callable[[], Any]:
        log = SampleLog(place)
        for k in range(20):
            sample = Sample(problem=f"{k}", **facts)
            if sample.key not in log.samples:
                log.append(sample)
        return lambda: [key.problem for key in SampleLog(place).samples]

    return write


@pytest.fixture(params=["preprocess", "hf to mcore", "hf to mp_rank", "mcore to hf", "checkpoint", "samples"])
def write(request: pytest.FixtureRequest, hf: Path, mcore: Path) -> Write:
    writers: dict[str, Callable[[], Write]] = {
        "preprocess": lambda: preprocessing(hf),
        "hf to mcore": lambda: conversion(hf, "hf", "mcore", shard_size=40e-6),
        "hf to mp_rank": lambda: conversion(hf, "hf", "mcore", ckpt_format="torch"),
        "mcore to hf": lambda: conversion(mcore, "mcore", "hf", shard_size=40e-6),
        "checkpoint": training,
        "samples": samples,
    }
    return writers[request.param]()


def test_a_full_disk(write: Write, tmp_path: Path) -> None:
    expected = write(tmp_path / "expected")()
    failures, size = 0, 40
    while True:
        try:
            with files_of_at_most(size):
                found = write(tmp_path / "out")
            break
        except (MultiverseError, OSError) as error:
            failures += 1
            assert "\n" not in str(error) and str(tmp_path / "out") in str(error)
            # torch's own writer, which megatron-core uses, does not say what the system said.
            assert re.search("File too large|iostream error|inline_container", str(error))
        size = size * 3 // 2
    assert failures >= 3 and found() == expected


def test_an_interrupt(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(tmp_path / "expected")()
    real, calls, this_process = os.fsync, 0, os.getpid()

    def interrupted(descriptor: int) -> None:
        nonlocal calls
        calls += os.getpid() == this_process
        if calls == limit:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    limit, interrupts = 1, 0
    while True:
        calls = 0
        try:
            found = write(tmp_path / "out")
            break
        except KeyboardInterrupt:
            interrupts += 1
        limit += 1
    monkeypatch.undo()
    assert interrupts >= 2 and found() == expected
