"""Weights that change between and within answers: every token fits the weights that its record names."""

from __future__ import annotations

import json
import random

import pytest
import torch

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import from_record, to_record

from .toy import (
    EOS,
    ScriptedSampler,
    ToyModel,
    ask,
    assert_drained,
    forward_logits,
    random_prompt,
    random_script,
    toy_engine,
)

pytestmark = pytest.mark.usefixtures("overlap")


@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_drawn_with_the_weights_that_it_names(seed: int) -> None:
    rng = random.Random(seed)
    old, new = ToyModel(1), ToyModel(2)
    model = ToyModel(1)
    scripts = [random_script(rng, depth=2, blocks=2, most_paths=3, text=8) for _ in range(3)]
    requests = [ask(random_prompt(rng, 30), max_tokens=3000, sample=k) for k in range(3)]
    engine = toy_engine(model, sampler=ScriptedSampler(scripts), page_size=rng.choice([1, 16]), max_rows=8)
    for request in requests:
        engine.add_request(request)
    results = []
    for _ in range(rng.randint(3, 30)):
        results += engine.step()
    model.load_state_dict(new.state_dict())
    engine.use_weights(7)
    while engine.has_work:
        results += engine.step()
    assert_drained(engine)
    versions = set()
    for result in sorted(results, key=lambda result: result.request_id):
        prompt = list(result.prompt_ids)
        logits = {0: forward_logits(old, prompt, result), 7: forward_logits(new, prompt, result)}
        versions |= set(result.weight_versions)
        for index, version in enumerate(result.weight_versions):
            row = logits[version][len(prompt) + result.parents[index]].log_softmax(-1)
            logprob = result.logprobs[index]
            assert logprob is None or abs(logprob - row[result.token_ids[index]].item()) < 1e-9
        (end,) = result.ends
        row = logits[result.weight_versions[-1]][len(prompt) + end.parent].log_softmax(-1)
        assert end.token == EOS and abs(end.logprob - row[EOS].item()) < 1e-9
        record = json.loads(json.dumps(to_record(result)))
        assert from_record(record) == result
        for segment, after in zip(record["segments"], [*record["segments"][1:], None], strict=True):
            written = result.weight_versions[segment["start"] : after and after["start"]]
            assert segment["weight_versions"] == [written[0], written[-1]]
    assert versions == {0, 7}


def test_a_new_prompt_is_not_read_with_old_keys() -> None:
    model, prompt = ToyModel(1), list(range(26, 46))
    engine = toy_engine(model, page_size=4)
    engine.generate([ask(prompt, max_tokens=3)])
    model.load_state_dict(ToyModel(2).state_dict())
    engine.use_weights(1)
    (changed,) = engine.generate([ask(prompt, max_tokens=3)])
    (fresh,) = toy_engine(ToyModel(2), page_size=4).generate([ask(prompt, max_tokens=3)])
    assert changed.cached_tokens == 0 and changed.token_ids == fresh.token_ids
    assert torch.allclose(torch.tensor(changed.logprobs), torch.tensor(fresh.logprobs))


def test_weights_do_not_change_within_a_step() -> None:
    engine = toy_engine()
    said: list[str] = []

    def on_token(request_id: int, branch: str, ids: list[int]) -> None:
        with pytest.raises(GenerationError, match="within a step"):
            engine.use_weights(1)
        said.append("refused")

    engine.generate([ask([26, 27], max_tokens=30, min_tokens=5)], on_token=on_token)
    assert said and engine.weight_version == 0
