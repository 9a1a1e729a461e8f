"""Calls of tools in the text of an answer: whole, and cut into pieces anywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from megatron_multiverse.server.tool_calls import CallPiece, CallReader, read_calls

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}</tool_call>{"}]}}\n</tool_call>'
ADDED = ("add", '{"a": 1, "b": [2, {"c": "}</tool_call>{"}]}')
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
Calls = list[tuple[str | None, str]]

FOUND: list[tuple[str, str, Calls]] = [
    ("plain", "plain", []),
    ("", "", []),
    (" \n", " \n", []),
    ("a <b> c <tool_calls> <tool_", "a <b> c <tool_calls> <tool_", []),
    ("\n\nLet me see.\n", "\n\nLet me see.\n", []),
    (ADD, "", [ADDED]),
    (f"\n{ADD}\n{NOW}\n", "", [ADDED, ("now", "{}")]),
    (f"Let me see.\n{ADD}", "Let me see.", [ADDED]),
    (f"One.\n{NOW} Two.\n{NOW}\nThree.\n", "One.\n Two.\n\nThree.", [("now", "{}")] * 2),
    (f"<<tool_call<{NOW}>", "<<tool_call<>", [("now", "{}")]),
    (f"\n{NOW}\n\n{ADD}\nDone.", "Done.", [("now", "{}"), ADDED]),
    # The end tag is cut off, or never comes.
    (NOW.removesuffix("call>"), "", [("now", "{}")]),
    (NOW.removesuffix("</tool_call>") + " and so on", "and so on", [("now", "{}")]),
    (NOW.removesuffix("</tool_call>") + "}\n</tool_call>", "}\n</tool_call>", [("now", "{}")]),
    (NOW.removesuffix("</tool_call>") + NOW, "", [("now", "{}")] * 2),
    # Other forms of the same object.
    ('<tool_call>{"arguments": {"a": "é\\n"}, "name": "f"}</tool_call>', "", [("f", '{"a": "é\\n"}')]),
    ('<tool_call>{ "name" :\t"f\\u00e9\\"", "arguments":{"a":1 } , "id": [7]}</tool_call>', "", [('fé"', '{"a":1 }')]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"a": "\\\\"}}</tool_call>', "", [("f", '{"a": "\\\\"}')]),
    ('<tool_call>{"name": "f", "arguments": {}, "name": "g"}</tool_call>', "", [("f", "{}")]),
    # What is no call stays text, to the last character.
    ("<tool_call>", "<tool_call>", []),
    ("<tool_call>add(1, 2)</tool_call>", "<tool_call>add(1, 2)</tool_call>", []),
    ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    (
        '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
        [],
    ),
    ('<tool_call>{"name": "f", "arguments": "{}"}', '<tool_call>{"name": "f", "arguments": "{}"}', []),
    ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
    (
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        [],
    ),
    ('<tool_call>{"name": "\\ud800", "arguments": {}}', '<tool_call>{"name": "\\ud800", "arguments": {}}', []),
    ('<tool_call>{"name": "a\\x", "arguments": {}}', '<tool_call>{"name": "a\\x", "arguments": {}}', []),
    ("<tool_call>{'name': 'f'}</tool_call>", "<tool_call>{'name': 'f'}</tool_call>", []),
    ('<tool_call>{"name": "f"]</tool_call> so', '<tool_call>{"name": "f"]</tool_call> so', []),
    ('<tool_call>{"name": "f", ', '<tool_call>{"name": "f", ', []),
    (f"<tool_call>\n{NOW}", "<tool_call>", [("now", "{}")]),
    (f"<tool_call>x{ADD}y", "<tool_call>xy", [ADDED]),
]

BROKEN: list[tuple[str, Calls, str]] = [
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1,\n', [("f", '{"a": 1,\n')], ""),
    ('<tool_call>\n{"name": "f", "arguments": {"a": "b\n</tool_call>', [("f", '{"a": "b')], "</tool_call>"),
    ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', [("f", '{"a": 1')], "</tool_call>"),
    ('<tool_call>{"name": "f", "arguments": {"a": [1}}', [("f", '{"a": [1')], "}}"),
    ('<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>', [("f", '{"a": tru}')], ""),
    ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', [("f", '{"a": NaN}')], ""),
]
"""Texts of calls that are told of before they turn out to be none: what a stream has of the call, and as content."""


def as_stream(pieces: Sequence[str], most: int | None = None) -> tuple[str, Calls]:
    """What a client makes of the pieces of a stream."""
    reader, content, calls = CallReader(early=True, most=most), "", dict[int, dict[str, str]]()
    for piece in pieces:
        text, found = reader.push(piece)
        content += text
        for delta in (call.delta() for call in found):
            if "id" in delta:
                assert delta["index"] == len(calls) and delta["type"] == "function"
                calls[delta["index"]] = {"id": delta["id"]} | delta["function"]
            else:
                assert set(delta["function"]) == {"arguments"} and delta["function"]["arguments"]
                calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert len({call["id"] for call in calls.values()}) == len(calls)
    return content + reader.finish(), [(call["name"], call["arguments"]) for call in calls.values()]


@pytest.mark.parametrize(("text", "content", "calls"), FOUND)
def test_calls_are_told_from_text_wherever_it_is_cut(text: str, content: str, calls: Calls) -> None:
    said, found = read_calls(text, None)
    assert (said, [(call.name, call.arguments) for call in found]) == (content, calls)
    assert all(isinstance(json.loads(call.arguments), dict) for call in found)
    for cut in range(len(text) + 1):
        assert as_stream([text[:cut], text[cut:]]) == (content, calls)
    assert as_stream(list(text)) == (content, calls)
    for seed in range(20):
        cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=5))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert as_stream(pieces) == (content, calls)


@pytest.mark.parametrize(("text", "calls", "rest"), BROKEN)
def test_a_call_that_breaks_off_is_text_but_in_a_stream_that_has_told_of_it(text: str, calls: Calls, rest: str) -> None:
    said, found = read_calls(text, None)
    assert (said, found) == (text, [])
    for cut in range(len(text) + 1):
        assert as_stream([text[:cut], text[cut:]]) == (rest, calls)
    assert as_stream(list(text)) == (rest, calls)


def test_a_stream_has_the_name_at_once_and_arguments_as_they_come() -> None:
    reader = CallReader(early=True)
    assert reader.push("So.\n<tool_") == ("So.", [])
    assert reader.push('call>\n{"name": "f", "argu') == ("", [])
    assert reader.push('ments": {"a"') == ("", [CallPiece(0, '{"a"', "f")])
    assert reader.push(": 1") == ("", [CallPiece(0, ": 1")])
    assert reader.push("}}\n</tool") == ("", [CallPiece(0, "}")])
    assert reader.push("_call>\nDone") == ("\n\nDone", [])
    assert reader.finish() == "" and reader.num_calls == 1


PARTS = [
    NOW,
    NOW[:20],
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {',
    '"a": [1, "x',
    '"]',
    "}}",
    "}",
    "\n",
    " ",
    "Hi",
    "<",
    "{",
    '"',
    "\\",
]


@pytest.mark.parametrize("seed", range(10))
def test_random_text_is_told_whole_and_alike_however_it_is_cut(seed: int) -> None:
    """The content is of the text, in order, and all of it where there are no calls; streams differ by broken calls."""
    drawn, found = random.Random(seed), 0
    for _ in range(200):
        text = "".join(drawn.choices(PARTS, weights=[3, 1, 5, 5, 5, 3, 3, 5, *[1] * 8], k=drawn.randint(1, 14)))
        content, calls = read_calls(text, None)
        found += len(calls)
        for call in calls:
            assert isinstance(json.loads(call.arguments), dict) and call.arguments in text
        rest = iter(text)
        assert all(character in rest for character in content) and (calls or content == text)
        as_one = as_stream([text])
        assert as_stream(list(text)) == as_one
        cut = drawn.randint(0, len(text))
        assert as_stream([text[:cut], text[cut:]]) == as_one
        if len(as_one[1]) == len(calls):
            assert as_one == (content, [(call.name, call.arguments) for call in calls])
    assert found > 20


def test_calls_beyond_the_most_are_dropped() -> None:
    text = f"One.\n{ADD}\n{NOW} Two."
    said, calls = read_calls(text, 1)
    assert [(call.name, call.arguments) for call in calls] == [ADDED] and said == "One.\n\n Two."
    for cut in range(len(text) + 1):
        assert as_stream([text[:cut], text[cut:]], 1) == (said, [ADDED])


def test_long_nested_and_endless_texts_are_read_in_little_time() -> None:
    deep = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 20_000 + "]" * 20_000 + "}}</tool_call>"
    assert read_calls(deep, None) == (deep, []), "deeper than JSON is read"
    name, arguments = as_stream(list(deep))[1][0]
    assert name == "f" and arguments == deep[len('<tool_call>{"name": "f", "arguments": ') : -len("}</tool_call>")]
    blanks = "<tool_call>" + " " * 20_000
    assert as_stream(list(blanks + '{"name": "f", "arguments": {"a": 1}}')) == ("", [("f", '{"a": 1}')])
    assert as_stream(list(blanks)) == (blanks, [])
