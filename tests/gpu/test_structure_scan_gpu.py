"""The scan on a GPU: equal to the reference whatever lies in memory, no wait for the device, captured in a graph."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_multiverse.checkpoints.run_files import METRICS_FILE
from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.kernels.structure_scan import structure_scan, structure_scan_reference
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.families import qwen3
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.training.forward import masked_loss_sum
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.placement import TokenPlacer
from tests.random_tags import TAG_IDS, VOCAB, Pack, damage, deep_tags, make_pack, random_pack, random_tags, words, write
from tests.unit.data.test_sft_dataset import write_documents

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
TAGS = torch.tensor(TAG_IDS)


def poison(value: int) -> None:
    """Leave memory full of `value` for torch.empty to hand out."""
    filled = torch.full((1 << 24,), value, dtype=torch.int32, device="cuda")
    small = [torch.full((size,), value, dtype=torch.int32, device="cuda") for size in (64, 1024, 16384) * 20]
    del filled, small


def compare(ids: torch.Tensor, documents: torch.Tensor) -> None:
    """Kernels against reference on ids [b, s], documents [b, D, 2]."""
    got = structure_scan(ids.cuda(), documents.cuda(), TAGS.cuda())
    assert got.difference(structure_scan_reference(ids, documents, TAGS)) is None


@pytest.mark.parametrize("depth", range(1, 9))
def test_random_packs_equal_the_reference_in_poisoned_memory(depth: int) -> None:
    for seed in range(26):
        poison((-1, 2**31 - 1, 12345)[seed % 3])
        pack = random_pack(1000 * depth + seed, depth=depth, width=4 if depth < 5 else 2)
        compare(pack.ids[None], pack.documents[None])


def long_pack(tokens: int, seed: int) -> Pack:
    """Documents, some damaged, until there are `tokens` tokens; the last one is padding."""
    rng = random.Random(seed)
    responses, used = [], 0
    while True:
        tags = random_tags(rng, rng.randint(0, 4))
        response = write(rng, damage(rng, tags) if rng.random() < 0.2 else tags, text=rng.choice((3, 40)))
        if used + len(response) + 8 > tokens:
            break
        responses.append((words(rng, 8), response))
        used += sum(map(len, responses[-1]))
    return make_pack([*responses, ([40] * (tokens - used), [])], unused=3)


@pytest.mark.parametrize("tokens", [32768, 131072, 100001])
def test_long_packs_equal_the_reference(tokens: int) -> None:
    pack = long_pack(tokens, tokens)
    compare(pack.ids[None], pack.documents[None])


def test_one_document_of_tags_alone() -> None:
    """More tags than a program takes at a time, many times over; then with one tag too many."""
    rng = random.Random(5)
    tags = [tag for _ in range(60) for tag in random_tags(rng, 4, think=False)] + deep_tags(8)
    for extra in ([], [TAG_IDS[3]]):
        ids = torch.tensor([[TAG_IDS[tag] for tag in tags] + extra])
        scan = structure_scan(ids.cuda(), torch.zeros(1, 1, 2, dtype=torch.int32).cuda(), TAGS.cuda())
        assert bool(scan.malformed.any()) == bool(extra)
        compare(ids, torch.zeros(1, 1, 2, dtype=torch.int32))


def test_wild_inputs_equal_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        length = int(torch.randint(1, 2000, (1,), generator=generator))
        ids = torch.randint(-(2**62), 2**62, (2, length), generator=generator)
        ids[:, ::2] = TAGS[torch.randint(0, 12, ids[:, ::2].shape, generator=generator)]
        low, high = ((-(2**31), 2**31 - 1), (-5, length + 5))[seed % 2]
        compare(ids, torch.randint(low, high, (2, 9, 2), generator=generator, dtype=torch.int32))


def test_nothing_waits_for_the_device() -> None:
    pack = long_pack(8192, 0)
    given = pack.ids[None].cuda(), pack.documents[None].cuda(), TAGS.cuda()
    structure_scan(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        structure_scan(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scans_in_a_row_do_not_disturb_each_other() -> None:
    """Launches overlap and memory is used again: many scans of different rows, looked at only at the end."""
    packs = [long_pack(tokens, seed) for tokens in (3000, 16384, 70000) for seed in range(4)]
    given = [(pack.ids[None].cuda(), pack.documents[None].cuda()) for pack in packs]
    scans = [structure_scan(*given[turn % len(packs)], TAGS.cuda()) for turn in range(60)]
    wanted = [structure_scan_reference(pack.ids[None], pack.documents[None], TAGS) for pack in packs]
    for turn, scan in enumerate(scans):
        assert scan.difference(wanted[turn % len(packs)]) is None


def test_a_captured_scan_follows_its_inputs() -> None:
    packs = [long_pack(8192, seed) for seed in range(4)]
    rows = max(len(pack.documents) for pack in packs)
    documents = torch.full((4, rows, 2), 8192, dtype=torch.int32)
    for number, pack in enumerate(packs):
        documents[number, : len(pack.documents)] = pack.documents
    ids, spans = packs[0].ids[None].cuda(), documents[:1].cuda()
    tags = TAGS.cuda()
    structure_scan(ids, spans, tags)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scan = structure_scan(ids, spans, tags)
    for number in (1, 2, 3, 0):
        ids.copy_(packs[number].ids[None])
        spans.copy_(documents[number : number + 1])
        graph.replay()
        want = structure_scan_reference(packs[number].ids[None], documents[number : number + 1], TAGS)
        assert scan.difference(want) is None


def test_a_model_has_the_same_loss_by_scan_and_by_loader(tmp_path: Path) -> None:
    rng, documents = random.Random(2), []
    for _ in range(6):
        prompt, response = [*words(rng, 5), 50], write(rng, random_tags(rng, 2, width=2), text=3)
        documents.append((np.array(prompt), np.array(response)))
    write_documents(tmp_path / "set", documents, VOCAB)
    length = max(len(prompt) + len(response) for prompt, response in documents)
    loader = SFTLoader(SFTDataset(str(tmp_path / "set"), VOCAB), seq_length=length, micro_batch_size=1, pad=50)
    shape = qwen3(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        vocab_size=200, max_sequence_length=length,
    )  # fmt: skip
    device = torch.device("cuda")
    model = build_gpt_model(shape, dtype=torch.float32, device=device)
    batch = next(iter(loader))
    scanned, loaded = (TokenPlacer(loader, device, "dense") for _ in range(2))
    loaded._tag_ids = None  # takes the loader's arrays, as on the CPU
    losses = [masked_loss_sum(model, batch, placer) for placer in (scanned, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert float(losses[0][0]) > 0


class OneBatch:
    """What a TokenPlacer asks of its loader."""

    tag_ids = TAG_IDS

    def sample_name(self, sample_id: int) -> str:
        return f"set document {sample_id}"

    def sample_problem(self, sample_id: int) -> str | None:
        return None


def test_the_trainer_takes_the_scan_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    pack = next(pack for pack in (random_pack(seed) for seed in range(50)) if sum(pack.malformed) == 1)
    bad = pack.malformed.index(True)
    batch = {
        "input_ids": pack.ids[None],
        "documents": pack.documents[None],
        "sample_ids": torch.arange(len(pack.malformed))[None] + 70,
        "malformed": torch.zeros(1, len(pack.malformed), dtype=torch.bool),  # the loader let all of them pass
        "position_ids": torch.from_numpy(pack.layout.position_ids)[None],
        "r": torch.from_numpy(pack.layout.r)[None],
    }
    placer = TokenPlacer(OneBatch(), torch.device("cuda"), "dense", "causal")
    ids = pack.ids[None].cuda()
    placer.place(batch, ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        position_ids, params = placer.place(batch, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(params, LayoutParams) and params.layout.lists is not None
    assert torch.equal(position_ids.cpu(), batch["position_ids"]) and torch.equal(params.layout.r.cpu(), batch["r"])
    metrics = MetricsWriter(tmp_path, 1)
    placer.report(3, metrics)
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert len(lines) == 1 and f'"set document {70 + bad}"' in lines[0] and '"step": 3' in lines[0]
