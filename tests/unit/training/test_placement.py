"""Loader arrays and scan agree, and no document is trained as plain text without being named."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.errors import DataError, TrainingError
from megatron_multiverse.kernels.structure_scan import structure_scan
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.placement import TokenPlacer, raise_unless_equal
from megatron_multiverse.training.signals import StopSignals
from megatron_multiverse.training.trainer import train
from tests.random_tags import FIRST_WORD, VOCAB, damage, random_tags, words, write
from tests.unit.data.test_sft_dataset import write_documents
from tests.unit.training.synthetic import config

SEQ_LENGTH = 700


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SFTDataset:
    """40 documents with blocks, tags in some prompts, every fourth damaged."""
    rng = random.Random(11)
    documents = []
    while len(documents) < 40:
        tags = random_tags(rng, 2, width=2)
        if len(documents) % 4 == 3:
            tags = damage(rng, tags)
        prompt = [FIRST_WORD, *words(rng, 4), *rng.choices(VOCAB.tag_ids, k=rng.choice((0, 2)))]
        ids = [np.array(part, dtype=np.int64) for part in (prompt, write(rng, tags, text=3))]
        if len(ids[0]) + len(ids[1]) <= SEQ_LENGTH:
            documents.append((ids[0], ids[1]))
    folder = tmp_path_factory.mktemp("layouts")
    write_documents(folder / "set", documents, VOCAB)
    return SFTDataset(str(folder / "set"), VOCAB, malformed="causal")


def make_loader(dataset: SFTDataset, **options: int) -> SFTLoader:
    return SFTLoader(dataset, seq_length=SEQ_LENGTH, micro_batch_size=2, pad=FIRST_WORD, **options)


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "malformed"]


def test_loader_arrays_equal_the_scan(dataset: SFTDataset) -> None:
    tags = torch.tensor(dataset.structure_vocab.tag_ids)
    shapes, flagged = set(), 0
    for batch in make_loader(dataset, epochs=2):
        scan = structure_scan(batch["input_ids"], batch["documents"], tags)
        assert torch.equal(scan.position_ids.long(), batch["position_ids"])
        assert torch.equal(scan.r, batch["r"])
        assert not scan.malformed.any()  # what the parser rejected has no response in `documents`
        shapes.add(batch["documents"].shape)
        flagged += int(batch["malformed"].sum())
        named = batch["sample_ids"] >= 0
        assert (batch["documents"][..., 0][~named] <= SEQ_LENGTH).all() and named.any()
    assert len(shapes) <= 2  # one per epoch
    assert flagged > 9


def test_a_scan_that_differs_from_the_loader_stops_the_run(dataset: SFTDataset) -> None:
    batch = next(iter(make_loader(dataset)))
    scan = structure_scan(batch["input_ids"], batch["documents"], torch.tensor(dataset.structure_vocab.tag_ids))
    raise_unless_equal(scan, batch)
    for name in ("r", "position_ids"):
        getattr(scan, name)[0, 7] += 1
        with pytest.raises(TrainingError, match="disagree"):
            raise_unless_equal(scan, batch)
        getattr(scan, name)[0, 7] -= 1


def test_refusing_is_the_default(dataset: SFTDataset) -> None:
    strict = SFTDataset(dataset.prefixes, VOCAB)
    broken = next(k for k in range(len(dataset)) if dataset[k].problem)
    with pytest.raises(DataError, match=rf"document {broken}: .*data\.malformed to drop.* or to causal"):
        strict[broken]


@pytest.mark.parametrize(("policy", "outcome"), [("causal", "trained as plain text"), ("drop", "dropped: none")])
def test_training_names_each_document_that_it_cannot_read_once(
    dataset: SFTDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: Any, outcome: str
) -> None:
    dataset = SFTDataset(dataset.prefixes, VOCAB, malformed=policy)
    length = {"model.max_sequence_length": SEQ_LENGTH, "data.seq_length": SEQ_LENGTH, "model.vocab_size": 200}
    loader = make_loader(dataset)
    steps = 2 * len(list(make_loader(dataset, epochs=1)))
    with caplog.at_level(logging.WARNING):
        train(
            config(tmp_path, train_iters=steps, **length, **{"log.log_interval": 3, "data.malformed": policy}), loader
        )
    broken = [k for k in range(len(dataset)) if dataset[k].problem is not None]
    told = records(tmp_path)
    assert sorted(record["sample_id"] for record in told) == broken
    assert caplog.text.count(f"; {outcome}") == len(broken)
    for record in told:
        assert record["sample"] == dataset.name(record["sample_id"]) and record["found_by"] == "parser"
        assert record["problem"] == dataset[record["sample_id"]].problem
        assert caplog.text.count(f"{record['sample']}: ") == 1


class CrashingLoader(SFTLoader):
    """Breaks when microbatch number `at` is asked for."""

    at = -1

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == self.at:
                raise OSError("the disk is gone")
            yield batch


@pytest.mark.parametrize("end", ["crash", "signal"])
def test_an_interrupted_run_has_named_what_it_does_not_see_again(
    dataset: SFTDataset, tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log lines are rarer than checkpoints; a crash after a checkpoint, and a signal seen between two steps."""
    settings: dict = {"model.max_sequence_length": SEQ_LENGTH, "data.seq_length": SEQ_LENGTH, "model.vocab_size": 200}
    settings |= {"log.log_interval": 1000, "checkpoint.save_interval": 2, "optim.lr_warmup_iters": 0}
    make = functools.partial(CrashingLoader, dataset, seq_length=SEQ_LENGTH, micro_batch_size=1, pad=FIRST_WORD)
    steps = len(list(make(epochs=1)))  # of two microbatches each
    trained = [row["sample_ids"][row["malformed"]] for row in islice(make(), 2 * steps)]
    run = config(tmp_path, train_iters=steps, **settings)
    loader = make()
    if end == "crash":
        saved, loader.at = 2, 4
        with pytest.raises(OSError, match="the disk"):
            train(run, loader)
    else:
        asked = itertools.count()  # whether to stop: before the first step, and once after each
        monkeypatch.setattr(StopSignals, "__bool__", lambda self: next(asked) >= 1)
        saved = train(run, loader).step
        assert saved == 1
        monkeypatch.undo()
    before = {int(k) for ids in trained[: 2 * saved] for k in ids}
    assert before and {record["sample_id"] for record in records(tmp_path)} == before
    train(run, make())
    everything = {int(k) for ids in trained for k in ids}
    assert before < everything == {record["sample_id"] for record in records(tmp_path)}


def test_what_the_scan_alone_cannot_read_is_named_too(dataset: SFTDataset, tmp_path: Path) -> None:
    """A loader that hands a broken response to the scan; on the CPU, where the scan is the reference."""
    loader = make_loader(dataset)
    placer, strict = (TokenPlacer(loader, torch.device("cpu"), "dense", policy) for policy in ("causal", "refuse"))
    placer._tag_ids = strict._tag_ids = torch.tensor(dataset.structure_vocab.tag_ids)
    batches = [b for b in make_loader(dataset, epochs=1) if b["malformed"].any()]
    broken = set()
    for batch in batches:
        flags = batch["malformed"]
        batch["malformed"] = torch.zeros_like(flags)
        batch["documents"][..., 1] = torch.where(flags, batch["documents"][..., 0], batch["documents"][..., 1])
        position_ids, params = placer.place(batch, batch["input_ids"])
        assert torch.equal(position_ids.long(), batch["position_ids"]) and params.layout.lists is not None
        assert torch.equal(params.layout.r, batch["r"])
        strict.place(batch, batch["input_ids"])
        broken |= set(batch["sample_ids"][flags].tolist())
    metrics = MetricsWriter(tmp_path, 1)
    for step in (1, 2):
        placer.report(step, metrics)
    assert {(r["sample_id"], r["found_by"], r["step"]) for r in records(tmp_path)} == {(k, "scan", 1) for k in broken}
    assert len(records(tmp_path)) == len(broken)
    with pytest.raises(TrainingError, match=rf"{loader.sample_name(min(broken))}: .*data.malformed is refuse"):
        strict.report(1, metrics)


def test_the_scan_is_compared_until_a_block_was_among_the_tokens(
    dataset: SFTDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    monkeypatch.setattr(
        "megatron_multiverse.training.placement.raise_unless_equal", lambda scan, batch: compared.append(1)
    )
    loader = make_loader(dataset)
    placer = TokenPlacer(loader, torch.device("cpu"), "dense", "causal")
    placer._tag_ids = torch.tensor(dataset.structure_vocab.tag_ids)
    blocks = [dict(batch) for batch in islice(loader, 3)]
    plain = blocks[0] | {"input_ids": torch.full_like(blocks[0]["input_ids"], FIRST_WORD)}
    for batch, wanted in ((plain, 1), (plain, 1), (blocks[1], 2), (plain, 2), (blocks[2], 2)):
        placer.place(batch, batch["input_ids"])
        assert len(compared) == wanted
