"""Garbage collections do not look at what a server has loaded, and what it drops is freed nevertheless."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.inference import EngineConfig, build_engine
from megatron_multiverse.server.engine_process import EngineHost
from megatron_multiverse.server.garbage import freeze_objects
from megatron_multiverse.server.rank_model import RankModel
from tests.unit.server.running import MODEL


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    gc.unfreeze()  # other tests of this process may have served, too
    yield
    gc.unfreeze()


class Closed:
    """A channel whose other side is gone."""

    closed = True

    def send(self, message: dict[str, Any]) -> None:
        """Nobody hears it."""


def test_what_is_there_when_a_server_is_ready_is_not_looked_at_again() -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(MODEL))
    engine = build_engine(str(MODEL), tokenizer, EngineConfig(max_rows=2))
    assert gc.get_freeze_count() == 0
    EngineHost(engine, cast(Any, Closed()), str(MODEL)).run()
    assert gc.get_freeze_count() > 50_000 and len(gc.get_objects()) < 5_000


def test_objects_that_refer_to_each_other_are_freed_though_they_were_frozen() -> None:
    """As the parts of an engine are, whose memory is to be given back."""
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    first.other, second.other = [second], [first]
    gone = weakref.ref(first)
    freeze_objects()
    del first, second
    gc.collect()
    assert gone() is not None
    RankModel(torch.nn.Linear(1, 1), "").free()
    assert gone() is None
