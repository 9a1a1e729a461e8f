"""An epoch has the shares that the mixture says, all documents come equally often, and a run resumes inside it."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiverse.config import DataConfig
from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.mixture import PAPER_SHARES, Mixture
from megatron_multiverse.errors import CheckpointError, ConfigError
from tests.unit.data.test_sft_dataset import PAD, write_documents

CONFIGS = Path(__file__).parents[3] / "pretrain_scripts" / "configs"


def test_the_papers_epochs() -> None:
    """1,000 rows of either kind: eight chunks of about 1,000 rows, of which so many are structured."""
    mixture = Mixture(PAPER_SHARES, 1000, 2000)
    epochs = [mixture.documents(3, epoch) for epoch in range(10)]
    assert [len(epoch) for epoch in epochs] == [1000] * 10
    assert [int((epoch < 1000).sum()) for epoch in epochs] == [0, 0, 100, 500, 500, 900, 1000, 1000, 1000, 1000]
    assert not set(epochs[3][:500]) & set(epochs[4][:500])  # the second half after the first one
    assert not np.array_equal(epochs[0], Mixture(PAPER_SHARES, 1000, 2000).documents(4, 0))


@pytest.mark.parametrize("name", ["tp8", "tp8_pp2", "zero3"])
def test_the_32b_configs_have_the_papers_epochs(name: str) -> None:
    data = yaml.safe_load((CONFIGS / f"qwen2.5_32b_{name}.yaml").read_text())["data"]
    assert tuple(data["mixture"]) == PAPER_SHARES and len(data["plain_prefixes"]) == len(data["data_prefixes"])


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=6).map(tuple),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    seed=st.integers(0, 9),
)
def test_all_documents_of_a_kind_come_equally_often(
    shares: tuple[float, ...], sizes: tuple[int, int], seed: int
) -> None:
    mixture = Mixture(shares, sizes[0], sum(sizes))
    seen: Counter[int] = Counter(dict.fromkeys(range(sum(sizes)), 0))
    for epoch in range(8):
        if sum(round(part * size) for part, size in zip(_split(shares, epoch), sizes, strict=True)) == 0:
            with pytest.raises(ConfigError, match=f"epoch {epoch} of data.mixture, .*has no documents"):
                mixture.documents(seed, epoch)
            return
        documents = mixture.documents(seed, epoch).tolist()
        assert len(set(documents)) == len(documents)
        seen.update(documents)
        for kind in (range(sizes[0]), range(sizes[0], sum(sizes))):
            counts = [seen[document] for document in kind]
            assert max(counts) - min(counts) <= 1


def _split(shares: tuple[float, ...], epoch: int) -> tuple[float, float]:
    share = shares[min(epoch, len(shares) - 1)]
    return share, 1 - share


def test_a_loader_follows_its_mixture_and_resumes_inside_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    documents = [(np.full(2, 15), rng.integers(15, 19, rng.integers(1, 7))) for _ in range(24)]
    dataset = write_documents(tmp_path / "set", documents)

    def make(shares: tuple[float, ...] = (0.0, 0.5, 1.0)) -> SFTLoader:
        return SFTLoader(
            dataset, seq_length=10, micro_batch_size=1, pad=PAD, seed=5, mixture=Mixture(shares, 12, 24), epochs=3
        )

    whole = [batch["sample_ids"] for batch in make()]
    assert len(whole) == make().count_packs(3)
    packs = [make()._pack(epoch).packs for epoch in range(3)]
    kinds = [Counter(document < 12 for pack in epoch for document in pack) for epoch in packs]
    assert kinds == [{False: 12}, {True: 6, False: 6}, {True: 12}]
    first = make()
    begun = [batch["sample_ids"] for batch in islice(iter(first), 7)]
    second = make()
    second.load_state_dict(first.state_dict())
    assert [row.tolist() for row in begun] + [batch["sample_ids"].tolist() for batch in second] == [
        row.tolist() for row in whole
    ]
    other = make((0.0, 0.6, 1.0))
    with pytest.raises(CheckpointError, match=r"mixture: saved \[12, 0.0, 0.5, 1.0\], now \[12, 0.0, 0.6, 1.0\]"):
        other.load_state_dict(first.state_dict())
    plain = SFTLoader(dataset, seq_length=10, micro_batch_size=1, pad=PAD, seed=5)
    with pytest.raises(CheckpointError, match=r"mixture: saved None, now \[12"):
        other.load_state_dict(plain.state_dict())


def test_a_mixture_needs_both_kinds_and_shares() -> None:
    with pytest.raises(ConfigError, match=r"go together.* mixture \[0.5\] and plain_prefixes \[\]: set both"):
        DataConfig(data_prefixes=("a",), mixture=(0.5,))
    with pytest.raises(ConfigError, match="go together"):
        DataConfig(data_prefixes=("a",), plain_prefixes=("b",))
    with pytest.raises(ConfigError, match=r"shares in \[0, 1\], got \[1.5\]"):
        DataConfig(data_prefixes=("a",), plain_prefixes=("b",), mixture=(0.5, 1.5))
