"""A grammar whose text names a token, as an enum that holds `<think>`: the text is written in letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llguidance")

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.config.sampling import GrammarKind
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.inference import Request
from megatron_multiverse.inference.build import build_engine, grammars_of
from megatron_multiverse.inference.text.answer import answer_text
from megatron_multiverse.inference.text.guide import Grammars
from megatron_multiverse.structure import Tag
from tests.real_tokenizers import real_tokenizer_folder

MODEL = Path(__file__).parents[3] / "examples" / "quickstart" / "model"
GRAMMARS: list[tuple[GrammarKind, str, str]] = [
    ("json_schema", '{"enum": ["say <think> it"]}', '"say <think> it"'),
    ("json_schema", '{"const": "\\u003c/tool_call>"}', '"</tool_call>"'),
    ("regex", "a<[t]hink>b", "a<think>b"),
    ("choice", '["<|im_end|>"]', "<|im_end|>"),
    ("grammar", 'start: "x" "<Path>" "<Think>"', "x<Path><Think>"),
]


@pytest.fixture(scope="module")
def qwen() -> tuple[HuggingFaceTokenizer, Grammars]:
    tokenizer = HuggingFaceTokenizer(real_tokenizer_folder("qwen3"))
    grammars = grammars_of(tokenizer)
    assert grammars is not None
    return tokenizer, grammars


@pytest.mark.parametrize(("kind", "grammar", "text"), GRAMMARS)
def test_what_the_mask_allows_can_be_written(
    qwen: tuple[HuggingFaceTokenizer, Grammars], kind: GrammarKind, grammar: str, text: str
) -> None:
    tokenizer, grammars = qwen
    assert tokenizer.eod is not None
    guide = grammars.begin(SamplingParams(grammar_kind=kind, grammar=grammar), frozenset({tokenizer.eod}))
    think = tokenizer.structure_vocab.tag_ids[Tag.THINK]
    ids: list[int] = []
    while not guide.is_complete:
        bits = np.unpackbits(guide.mask().view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        may = [token for token in np.flatnonzero(bits).tolist() if token != think]
        assert may, tokenizer.detokenize(ids)
        ids.append(may[0])
        guide.push(may[0])
        assert not guide.error
    assert tokenizer.detokenize(ids) == text


def test_a_tag_that_a_grammar_spells_is_text_and_no_structure() -> None:
    tokenizer = HuggingFaceTokenizer(MODEL)
    engine = build_engine(MODEL, tokenizer, EngineConfig(num_pages=64))
    thinks_not = {tokenizer.structure_vocab.tag_ids[Tag.THINK]: -100.0}
    choice = '["<Goal>a</Goal>", "<Goal>b</Goal>"]'
    sampling = SamplingParams(max_tokens=60, grammar_kind="choice", grammar=choice, logit_bias=thinks_not)
    (result,) = engine.generate([Request(prompt_ids=tokenizer.tokenize("abc"), sampling=sampling)])
    assert result.finish_reason == "stop" and not result.blocks
    assert answer_text(result, tokenizer.detokenize) in ("<Goal>a</Goal>", "<Goal>b</Goal>")
    assert not set(result.token_ids) & set(tokenizer.structure_vocab.tag_of)
