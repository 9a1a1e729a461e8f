"""Packing loses and splits nothing; the loader resumes to the batch on any number of ranks."""

from __future__ import annotations

import multiprocessing
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.mixture import Mixture
from megatron_multiverse.data.packing import pack
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.errors import CheckpointError, ConfigError, DataError
from tests.unit.data.test_sft_dataset import PAD, PIECES, write_documents

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80).map(np.array)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, seq_length=st.integers(40, 90), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_every_document_is_in_one_pack_that_holds_it(lengths, seq_length, seed, epoch):
    packing = pack(lengths, seq_length, seed=seed, epoch=epoch)
    assert sorted(document for documents in packing.packs for document in documents) == list(range(len(lengths)))
    loads = [int(lengths[documents].sum()) for documents in packing.packs]
    assert max(loads) <= seq_length
    assert packing.fill == pytest.approx(sum(loads) / (len(loads) * seq_length))
    # Best fit never leaves two packs that would fit into one.
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > seq_length
    assert packing == pack(lengths, seq_length, seed=seed, epoch=epoch)


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seq_length=st.integers(1, 40))
def test_overlong_documents_are_refused_or_dropped_and_counted(lengths, seq_length):
    too_long = int((lengths > seq_length).sum())
    if too_long == 0:
        assert pack(lengths, seq_length, seed=0, epoch=0, overlong="drop").dropped == 0
        return
    named = f"{too_long} of {len(lengths)} documents are longer.*, the longest \\(document {lengths.argmax()}\\) has "
    with pytest.raises(DataError, match=named):
        pack(lengths, seq_length, seed=0, epoch=0)
    if too_long == len(lengths):
        named = f"no document of epoch 0 fits into seq_length .*, the shortest has {lengths.min()} tokens"
        with pytest.raises(DataError, match=named):
            pack(lengths, seq_length, seed=0, epoch=0, overlong="drop")
        return
    packing = pack(lengths, seq_length, seed=0, epoch=0, overlong="drop")
    assert packing.dropped == too_long
    assert sorted(d for p in packing.packs for d in p) == np.flatnonzero(lengths <= seq_length).tolist()


def test_epochs_and_seeds_differ():
    lengths = np.full(50, 3)
    orders = {str(pack(lengths, 9, seed=seed, epoch=epoch).packs) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SFTDataset:
    """23 documents; each response token tells the document's length, so batches differ."""
    rng = np.random.default_rng(3)
    documents = [(np.full(2, 15), rng.integers(15, 19, rng.integers(1, 7))) for _ in range(23)]
    return write_documents(tmp_path_factory.mktemp("loader") / "set", documents)


def _loader(dataset: SFTDataset, **options) -> SFTLoader:
    base = {"seq_length": 10, "micro_batch_size": 2, "pad": PAD, "seed": 5}
    return SFTLoader(dataset, **(base | options))


def _take(loader: SFTLoader, count: int | None) -> list[dict[str, torch.Tensor]]:
    return list(islice(iter(loader), count))


def _assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_batch_has_the_promised_tensors(dataset):
    (batch,) = _take(_loader(dataset), 1)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 10)),
        "labels": (torch.int64, (2, 10)),
        "loss_mask": (torch.float32, (2, 10)),
        "position_ids": (torch.int64, (2, 10)),
        "r": (torch.int32, (2, 10)),
        "documents": (torch.int32, (2, 4, 2)),
        "sample_ids": (torch.int64, (2, 4)),
        "malformed": (torch.bool, (2, 4)),
    }


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 9, 15])
def test_resumed_stream_equals_the_uninterrupted_one(dataset, stop, num_workers):
    whole = _take(_loader(dataset, epochs=4), None)
    assert len(whole) > 15
    first = _loader(dataset, epochs=4, num_workers=num_workers)
    begun = _take(first, stop)
    second = _loader(dataset, epochs=4, num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    _assert_equal(begun + _take(second, None), whole)


def test_second_iterator_goes_on(dataset):
    loader = _loader(dataset)
    _assert_equal(_take(loader, 2) + _take(loader, 3), _take(_loader(dataset), 5))


def test_ranks_share_each_stretch_of_packs(dataset):
    whole = _take(_loader(dataset, micro_batch_size=4, epochs=2), None)
    ranks = [_take(_loader(dataset, data_parallel_rank=k, data_parallel_size=2, epochs=2), None) for k in (0, 1)]
    joined = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*ranks, strict=True)]
    _assert_equal(joined, whole)


def test_state_moves_to_another_number_of_ranks(dataset):
    whole = _take(_loader(dataset, epochs=1), None)
    pair = [_loader(dataset, micro_batch_size=1, data_parallel_rank=k, data_parallel_size=2) for k in (0, 1)]
    for loader in pair:
        _take(loader, 2)
    assert pair[0].state_dict() == pair[1].state_dict()
    alone = _loader(dataset, epochs=1)
    alone.load_state_dict(pair[1].state_dict())
    _assert_equal(_take(alone, None), whole[2:])


@pytest.mark.parametrize("tail", ["drop", "continue", "pad"])
def test_tail_of_an_epoch(dataset, tail):
    size = len(pack(dataset.lengths, 10, seed=5, epoch=0).packs) - 1  # one pack is left over
    loader = _loader(dataset, micro_batch_size=size, tail=tail, epochs=1)
    batches = _take(loader, None)
    assert len(batches) == (1 if tail == "drop" else 2)
    if tail != "drop":  # nothing follows the last epoch
        left_over = _take(_loader(dataset, micro_batch_size=1, epochs=1), None)[-1]
        assert torch.equal(batches[1]["input_ids"][:1], left_over["input_ids"])
        assert (batches[1]["input_ids"][1:] == PAD).all() and not batches[1]["loss_mask"][1:].any()
        assert (batches[1]["sample_ids"][1:] == -1).all()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (3, 1), (2, 2), (1, 5), (40, 1)])
def test_a_continued_stream_is_the_same_for_all_batches_and_ranks(dataset, size, ranks, num_workers, resumed):
    """Also where a batch takes packs of several epochs, and where a run goes on with other batches on other ranks."""
    epochs = [_loader(dataset, micro_batch_size=1, epochs=8)._pack(epoch).packs for epoch in range(8)]
    packs = [tuple(pack) for epoch in epochs for pack in epoch]
    begun = 7 if resumed else 0
    before = _loader(dataset, micro_batch_size=1, tail="continue")
    _take(before, begun)
    shared = [
        _loader(
            dataset, micro_batch_size=size, data_parallel_rank=rank, data_parallel_size=ranks, tail="continue",
            num_workers=num_workers,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    count = 100 // (size * ranks)
    seen = []
    for loader in shared:
        loader.load_state_dict(before.state_dict())
    for batches in zip(*(_take(loader, count) for loader in shared), strict=True):
        rows = [row for batch in batches for row in batch["sample_ids"].tolist()]
        seen += [tuple(document for document in row if document >= 0) for row in rows]
    assert count > 0 and seen == packs[begun : begun + count * size * ranks]
    assert len({str(loader.state_dict()) for loader in shared}) == 1


def test_padding_ends_each_epoch_that_is_not_the_last_one_too(dataset):
    rows = [
        [int((row >= 0).any()) for row in batch["sample_ids"]]
        for batch in _take(_loader(dataset, micro_batch_size=3, tail="pad", epochs=2), None)
    ]
    counts = [len(pack(dataset.lengths, 10, seed=5, epoch=epoch).packs) for epoch in (0, 1)]
    flat = [flag for batch in rows for flag in batch]
    expected = [[1] * count + [0] * (-count % 3) for count in counts]
    assert any(count % 3 for count in counts) and flat == expected[0] + expected[1]


def test_drawing_batches_leaves_the_global_random_state_alone(dataset):
    before = torch.get_rng_state()
    _take(_loader(dataset), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_epoch_and_fill_are_told(dataset):
    loader = _loader(dataset)
    assert 0.5 < loader.fill <= 1
    _take(loader, len(_take(_loader(dataset, epochs=1), None)) + 1)
    assert loader.epoch == 1


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 6), ("seq_length", 12), ("documents", "other")], ids=lambda value: str(value)
)
def test_foreign_state_is_refused(dataset, name, value):
    loader = _loader(dataset)
    with pytest.raises(CheckpointError, match=f"{name}: saved {value}"):
        loader.load_state_dict(loader.state_dict() | {name: value})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_document_is_one_clear_error_from_any_process(tmp_path, num_workers):
    end_path = np.array([PIECES.index("</Path>")])
    broken = write_documents(tmp_path / "bad", [(np.array([15]), end_path)] * 3)
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match=r"^sample .*bad document \d: stray_tag at token 1: found") as caught:
        _take(_loader(broken, num_workers=num_workers, seq_length=2), 1)
    assert "Traceback" not in str(caught.value) and "worker process" not in str(caught.value)
    # Also while the error holds the frames: a run that ends with it would wait for the process for ever.
    assert set(multiprocessing.active_children()) <= others


def test_a_loader_process_that_is_gone_is_told_with_the_files_it_read(dataset):
    loader, others = _loader(dataset, num_workers=2, tail="continue"), set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    worker, other = set(multiprocessing.active_children()) - others
    # torch raises in its handler of this signal, wherever the main thread is by then: in this test, perhaps.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        worker.kill()
        worker.join()
        told = rf"^a process that loads data ended \(.*{dataset.prefixes[0]}\.bin\)\. Look at both"
        with pytest.raises(DataError, match=told):
            for _ in range(100):  # those made beforehand come first
                next(batches)
        assert not other.is_alive(), "it ignores the SIGTERM of a process that ends, which would wait for it for ever"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def test_impossible_batches_are_refused(dataset):
    with pytest.raises(ConfigError, match="fewer than micro_batch_size"):
        _loader(dataset, micro_batch_size=100)
    with pytest.raises(ConfigError, match="must be in"):
        _loader(dataset, data_parallel_rank=2, data_parallel_size=2)


def test_epochs_of_a_mixture_that_give_no_batch_are_refused(dataset):
    """All of them would be left out, for ever."""
    loader = _loader(dataset, micro_batch_size=5, mixture=Mixture((0.0, 1.0), 2, len(dataset)))
    with pytest.raises(ConfigError, match=r"^epoch 1 has 2 packs, fewer than micro_batch_size"):
        _take(loader, 20)


def test_an_overlong_document_is_named_with_its_prefix(dataset):
    longest = int(dataset.lengths.argmax())
    with pytest.raises(
        DataError, match=rf"the longest \({dataset.prefixes[0]} document {longest}\) has 8 tokens; raise"
    ):
        _loader(dataset, seq_length=7)


def test_dropped_documents_are_logged(dataset, caplog):
    _loader(dataset, seq_length=7, overlong="drop")
    assert "are longer than seq_length (7) and are dropped" in caplog.text
