"""An answer survives JSON, and the trainer's forward pass over its row gives the log-probabilities of decoding."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron_multiverse.config import ModelConfig, SamplingParams
from megatron_multiverse.data.sft_dataset import pack_arrays
from megatron_multiverse.errors import DataError
from megatron_multiverse.inference import Request, Result, from_record, to_record, training_row
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.training.forward import masked_loss_sum
from megatron_multiverse.training.placement import TokenPlacer

from .toy import (
    VOCAB,
    VOCAB_SIZE,
    ScriptedSampler,
    SoupSampler,
    ToyModel,
    random_prompt,
    random_script,
    toy_engine,
)


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=VOCAB_SIZE, max_sequence_length=4096,
    )  # fmt: skip
    return build_gpt_model(config, dtype=torch.float64).eval()


def answer(model: nn.Module, seed: int, *, soup: bool = False) -> Result:
    """A random tree with everything that can be asked of it."""
    rng = random.Random(seed)
    sampling = SamplingParams(
        max_tokens=rng.randint(30, 200) if soup else 2000,
        commit_after=rng.choice([0, 0, 1, 2]),
        seed=5 if soup else 0,
        logprobs=rng.choice([0, 3]),
        prompt_logprobs=rng.choice([None, 0, 2]),
        stop=("bc", "\n1:a"),
        stop_in_branches=True,
    )
    script = random_script(rng, depth=rng.choice([1, 2, 3]), blocks=2, most_paths=3, text=6)
    sampler = SoupSampler(seed) if soup else ScriptedSampler([script])
    engine = toy_engine(model, sampler=sampler, page_size=rng.choice([1, 16]))
    (result,) = engine.generate([Request(prompt_ids=random_prompt(rng, 20), sampling=sampling)])
    engine.runner.close()
    return result


@pytest.mark.parametrize("seed", range(20))
def test_records_survive_json(seed: int) -> None:
    result = answer(ToyModel(), seed, soup=seed % 2 == 1)
    record = json.loads(json.dumps(to_record(result)))
    assert from_record(record) == result
    assert record["sampled"] == [int(drawn) for drawn in result.sampled]
    assert len(record["segment_ids"]) == len(result.token_ids)
    for number, segment in enumerate(record["segments"]):
        assert segment["parent"] < number
        parent = result.parents[segment["start"]]
        assert segment["parent"] == (-1 if parent < 0 else record["segment_ids"][parent])
    for index in range(1, len(result.token_ids)):
        new = record["segment_ids"][index] != record["segment_ids"][index - 1]
        assert new or result.parents[index] == index - 1


class NoTags:
    """A loader of which only the arrays count."""

    tag_ids = None


@pytest.mark.parametrize("seed", range(12))
def test_the_trainers_forward_gives_the_log_probabilities_of_decoding(gpt: nn.Module, seed: int) -> None:
    result = from_record(json.loads(json.dumps(to_record(answer(gpt, seed, soup=seed % 3 == 2)))))
    row = training_row(result, VOCAB)
    count = len(row.sample.ids)
    batch: dict[str, Any] = {k: torch.from_numpy(v)[None] for k, v in pack_arrays([row.sample], count + 3, 0).items()}
    placer = TokenPlacer(NoTags(), torch.device("cpu"), "dense")  # type: ignore[arg-type]
    ids = batch["input_ids"]
    position_ids, params = placer.place(batch, ids)
    with torch.no_grad():
        logits = gpt(ids, position_ids, attention_mask=None, packed_seq_params=params)[0]
        own = logits.log_softmax(-1).gather(1, batch["labels"][0, :, None])[:, 0].numpy()
        batch["loss_mask"] = torch.from_numpy(np.append(row.drawn[1:], [False] * 4).astype(np.float64))[None]
        total, _ = masked_loss_sum(gpt, batch, placer)
    drawn = np.flatnonzero(row.drawn)
    assert len(drawn) > 0 or not any(result.sampled)
    np.testing.assert_allclose(own[drawn - 1], row.logprobs[drawn], rtol=0, atol=1e-9)
    assert abs(total.item() + row.logprobs.sum()) < 1e-6 * max(1, len(drawn)), "megatron-core's loss is float32"
    trained = row.sample.layout.loss_mask()
    assert not (row.drawn & ~trained).any(), "every drawn token can be trained"


def test_records_that_are_none_are_refused() -> None:
    good = to_record(answer(ToyModel(), 3))
    for bad, message in [
        ([], "not an answer record"),
        ({**good, "format": "multiverse-answer/0"}, "multiverse-answer/0"),
        ({name: value for name, value in good.items() if name != "labels"}, "lacks labels"),
        ({**good, "labels": good["labels"][1:]}, "labels; it is damaged"),
        ({**good, "blocks": [{"number": 1}]}, "damaged"),
    ]:
        with pytest.raises(DataError, match=message):
            from_record(bad)  # type: ignore[arg-type]
    assert {field.name for field in fields(Result)} <= good.keys()
    result = answer(ToyModel(), 3)
    result.labels[-1] += 1
    with pytest.raises(DataError, match="layout"):
        training_row(result, VOCAB)
