"""What grammars hold calls of tools to."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("llguidance")

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.inference.build import grammars_of
from megatron_multiverse.inference.text.guide import Grammars, Guide
from megatron_multiverse.server.errors import ApiError
from megatron_multiverse.server.grammars import Grammar
from megatron_multiverse.server.tool_grammar import call_grammar
from megatron_multiverse.server.tools import NamedChoice, Tool, tool_use
from tests.real_tokenizers import real_tokenizer_folder
from tests.unit.server.running import MODEL
from tests.unit.server.tool_samples import ADD, NAMED, NOW, function


@cache
def reader(tokenizer: HuggingFaceTokenizer) -> Grammars:
    grammars = grammars_of(tokenizer)
    assert grammars is not None
    return grammars


def begun(grammar: Grammar, tokenizer: HuggingFaceTokenizer) -> Guide:
    assert tokenizer.eod is not None
    return reader(tokenizer).begin(
        SamplingParams(grammar_kind=grammar[0], grammar=grammar[1]), frozenset({tokenizer.eod})
    )


def fits(grammar: Grammar, tokenizer: HuggingFaceTokenizer, ids: list[int]) -> bool:
    """Whether an answer may be these ids, each of which has to be in the mask before it, too."""
    guide = begun(grammar, tokenizer)
    for token in ids:
        allowed = guide.mask().view("uint32")[token // 32] >> token % 32 & 1
        guide.push(token)
        assert bool(allowed) == (not guide.error), tokenizer.id_to_text[token]
        if guide.error:
            return False
    end = tokenizer.eod
    assert end is not None
    return bool(guide.mask().view("uint32")[end // 32] >> end % 32 & 1)


def grammar_for(tokenizer: HuggingFaceTokenizer, *tools: dict[str, Any], choice: Any, **options: Any) -> Grammar | None:
    asked_for = options.pop("asked", None)
    chosen = NamedChoice.model_validate(choice) if isinstance(choice, dict) else choice
    use = tool_use([Tool.model_validate(tool) for tool in tools], chosen, parallel=options.pop("parallel", True))
    return call_grammar(use, asked_for, tokenizer)


@pytest.mark.parametrize("name", ["quickstart", "qwen3"])
def test_grammars_hold_calls_to_their_schemas(name: str) -> None:
    """The tags of a call are letters to one tokenizer, and tokens to the other."""
    tokenizer = HuggingFaceTokenizer(MODEL if name == "quickstart" else real_tokenizer_folder(name))
    add = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "sign": "plus"}}\n</tool_call>'
    now = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    other = '<tool_call>\n{"name": "now", "arguments": {"a": [1, {"b": "c"}]}}\n</tool_call>'
    strict = {"type": "function", "function": ADD["function"] | {"strict": True}}
    free, answer = "Well.", '{"n":1}'
    wrong = add.replace("plus", "times")
    schema: Grammar = ("json_schema", '{"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"]}')

    def check(grammar: Grammar | None, good: list[str], bad: list[str]) -> None:
        assert grammar is not None
        for text in good:
            assert fits(grammar, tokenizer, tokenizer.tokenize(text)), text
        for text in bad:
            assert not fits(grammar, tokenizer, tokenizer.tokenize(text)), text

    texts = [wrong, free, add + add, f"\n{add}", add + free, add.replace(", ", ",")]
    check(grammar_for(tokenizer, ADD, NOW, choice="required"), [add, now, f"{add}\n{now}\n{add}"], [other, *texts])
    one = grammar_for(tokenizer, ADD, NOW, choice="required", parallel=False)
    check(one, [add, now], [f"{add}\n{now}", other, *texts])
    named = grammar_for(tokenizer, ADD, NOW, choice=NAMED)
    check(named, [add], [now, f"{add}\n{add}", *texts])
    auto = grammar_for(tokenizer, strict, NOW, choice="auto")
    check(
        auto, [free, add, f"{free}\n{add}{other} {now}\n{free} <tool", add + add], [wrong, free + wrong, "<tool_call>a"]
    )
    auto = grammar_for(tokenizer, strict, NOW, choice=None, parallel=False)
    check(auto, [free, f"{free} {add}", other], [wrong, add + free, add + now])
    either = grammar_for(tokenizer, ADD, NOW, choice="auto", asked=schema)
    check(either, [answer, add.replace("}}", ', "z": 1}}'), now + "\n" + other], [free, add + answer, '{"n":2}'])
    assert grammar_for(tokenizer, ADD, NOW, choice="auto") is None
    assert grammar_for(tokenizer, choice="auto") is None
    letters = [token for part in ("<", "tool", "_call", ">") for token in tokenizer.tokenize(part)]
    assert letters != tokenizer.tokenize("<tool_call>") or name == "quickstart"
    rest = tokenizer.tokenize(wrong.removeprefix("<tool_call>"))
    assert not fits(auto, tokenizer, letters + rest), "a tag in letters begins a call as well"  # type: ignore[arg-type]


def test_a_grammar_needs_functions_that_can_be_held() -> None:
    tokenizer = HuggingFaceTokenizer(MODEL)
    unread = function(parameters={"type": "object", "properties": {"a": {"not": {"type": "string"}}}})
    assert grammar_for(tokenizer, unread, choice="auto") is None, "nothing is held to it"
    with pytest.raises(ApiError, match=r"function 'f' cannot be held to its parameters: .*not"):
        grammar_for(tokenizer, unread, choice="required")
