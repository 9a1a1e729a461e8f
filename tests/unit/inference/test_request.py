"""Requests keep what they were given, and noise depends on the value of a seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference import IncrementalDetokenizer
from megatron_multiverse.inference.text.request import Request

from .toy import VOCAB, ToyModel, ask, toy_engine


def test_a_list_that_changes_while_the_request_waits_changes_nothing() -> None:
    engine, buffer = toy_engine(ToyModel()), [30, 31, 32]
    stop = [40]
    request = Request(prompt_ids=buffer, sampling=SamplingParams(stop_token_ids=stop))  # type: ignore[arg-type]
    engine.add_request(request)
    buffer.clear()
    stop.append(41)
    (result,) = engine.generate([ask([30, 31, 32], max_tokens=4)])
    assert result.prompt_ids == [30, 31, 32]
    assert request.prompt_ids == (30, 31, 32)
    assert request.sampling.stop_token_ids == (40,)


@pytest.mark.parametrize("make", [np.int64, np.uint8, np.array])
def test_noise_depends_on_the_value_of_the_seed_not_on_its_type(make: type) -> None:
    def answer(seed: object, sample: object) -> list[int]:
        request = ask([30, 31], sample=sample, seed=seed, temperature=6.0, max_tokens=20)  # type: ignore[arg-type]
        return toy_engine(ToyModel()).generate([request])[0].token_ids

    assert answer(make(3), make(1)) == answer(3, 1)
    assert answer(True, True) == answer(1, 1)


def test_numbers_that_are_not_whole_are_refused() -> None:
    for given in ({"seed": 3.0}, {"seed": "3"}, {"stop_token_ids": (1.5,)}):
        with pytest.raises(GenerationError, match=f"{next(iter(given))} takes whole numbers"):
            SamplingParams(**given)
    with pytest.raises(GenerationError, match=r"prompt_ids takes whole numbers, got 2\.5"):
        Request(prompt_ids=[1, 2.5])  # type: ignore[list-item]
    with pytest.raises(GenerationError, match="sample takes whole numbers"):
        Request(prompt_ids=[1], sample=0.5)  # type: ignore[arg-type]


def test_stop_tokens_that_cannot_work_are_refused() -> None:
    engine = toy_engine(ToyModel())
    with pytest.raises(GenerationError, match="structure tag </Path>"):
        engine.add_request(ask([30], stop_token_ids=(VOCAB.tag_ids[9],)))
    with pytest.raises(GenerationError, match="a stop token is 99999"):
        engine.add_request(ask([30], stop_token_ids=(99999,)))


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused() -> None:
    model = ToyModel()
    with pytest.raises(GenerationError, match=f"{model.vocab_size + 1} ids, the model {model.vocab_size} rows"):
        toy_engine(model, vocab_size=model.vocab_size + 1)


def test_cancelling_an_id_that_is_given_later_does_not_end_that_request() -> None:
    engine = toy_engine(ToyModel())
    engine.cancel(0)
    (result,) = engine.generate([ask([30], max_tokens=4, ignore_eos=True)])
    assert result.finish_reason == "length"


def test_bytes_that_are_no_text_come_out_in_bounded_time_and_the_pieces_add_up() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return bytes(ids).decode(errors="replace")

    detokenizer = IncrementalDetokenizer(decode)
    data = [0x80] * 500 + list("é😀".encode()) + [0xF0, 0x9F] * 200 + list("Ω".encode()) + [0xE2]
    pieces = [detokenizer.push([byte]) for byte in data]
    assert "".join(pieces[:100]).count("\ufffd") >= 95
    assert "".join(pieces) + detokenizer.finish() == bytes(data).decode(errors="replace")
    assert longest < 32
