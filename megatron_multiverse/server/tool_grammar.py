"""Answers that call tools, as a grammar: the text of each call, with the schema of its arguments inside of it."""

from __future__ import annotations

import functools
import json
from typing import Any

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.server.body import parse_json
from megatron_multiverse.server.errors import ApiError, refuse
from megatron_multiverse.server.grammars import MOST_CHARACTERS, Grammar
from megatron_multiverse.server.tool_calls import CLOSE, OPEN
from megatron_multiverse.server.tools import Function, ToolUse

_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How the arguments are written in what models are trained on: as Python's json writes them."""
_COMPACT = {"whitespace_flexible": False}
"""As all other JSON, see `inference/text/guide.py`."""
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_END = "}\n"
_INSTEAD = "hold calls to no schema (tool_choice auto, no function strict)"


def call_grammar(use: ToolUse, asked: Grammar | None, tokenizer: MultiverseTokenizer) -> Grammar | None:
    """What an answer that may call tools is held to; None if to nothing.

    Args:
        use: the tools, and whether they must be called.
        asked: what the answer must be where it does not call any.
        tokenizer: of the model; where it has tokens for the tags around a call, these are the only way to write them.

    Raises:
        ApiError: 400, naming the field and the function.
    """
    if asked is not None and asked[0] != "json_schema":
        raise refuse(
            "tools", f"not together with a {asked[0]} for the answer; give a JSON schema instead, or tool_choice none"
        )
    is_held = use.choice == "required"
    functions = use.functions if use.named is None else [use.named]
    strict = [is_held or bool(function.strict) for function in functions]
    if asked is None and not any(strict):
        return None
    begin, end = (_tag(text, tokenizer) for text in (OPEN, CLOSE))
    if is_held or asked is not None:
        start = "call" if use.most_calls == 1 else 'call ("\\n" call)*'
        rules = [f"call: {begin} body {end}"]
        if asked is not None and not is_held:
            start += " | answer"
            rules.append("answer: " + _json(_schema_of(asked[1]), _COMPACT))
    else:
        start = "call | TEXT" if use.most_calls == 1 else "call* TEXT"
        # Where a token stands for the tag, the letters of the tag can be written, too: they begin a call as well.
        head = "heard" if begin == _quoted(OPEN) else f"heard | TEXT {begin}"
        rules = [r"TEXT: /(.|\n)*/", f"heard[lazy]: TEXT {_quoted(OPEN)}", f"head: {head}", f"call: head body {end}"]
    rules.append("body: " + " | ".join(f"body_{k}" for k in range(len(functions))))
    for k, (function, is_strict) in enumerate(zip(functions, strict, strict=True)):
        rules.append(f"body_{k}: {_body(function, function.arguments_schema if is_strict else _ANY_OBJECT)}")
    text = "\n".join(["%llguidance {}", f"start: {start}", *rules, ""])
    if len(text) > MOST_CHARACTERS:
        raise refuse(
            "tools", f"{len(text)} characters as a grammar, {MOST_CHARACTERS} are allowed; give less, or {_INSTEAD}"
        )
    for function, is_strict in zip(functions, strict, strict=True):
        if is_strict:
            _check(function.name, json.dumps(function.arguments_schema))
    return "grammar", text


def _body(function: Function, schema: dict[str, Any]) -> str:
    """A call between its tags."""
    head = f'\n{{"name": {_quoted(function.name)}, "arguments": '
    return f"{_quoted(head)} {_json(schema, _AS_TRAINED)} {_quoted(_END)}"


def _check(name: str, schema: str) -> None:
    """Refuse a schema that llguidance does not read."""
    if problem := _problem(schema):
        raise refuse(
            "tools",
            f"calls of function {name[:40]!r} cannot be held to its parameters: {problem.strip()[:300]}; "
            f"leave that out of the schema, or {_INSTEAD}",
        )


@functools.lru_cache(maxsize=256)  # the same tools come with every turn of a conversation
def _problem(schema: str) -> str:
    """What llguidance has against a schema, if anything. Where it is not installed, the engine says so."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        return ""
    try:
        return str(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema)))
    except (ValueError, RecursionError) as error:
        return str(error)


def _schema_of(text: str) -> dict[str, Any]:
    """The schema that the answer must fit where it calls nothing."""
    try:
        schema = parse_json(text.encode())
    except ApiError:
        schema = None
    if not isinstance(schema, dict):
        raise refuse("tools", "beside tools the schema of the answer must be a JSON object; give one, or no tools")
    return schema


def _json(schema: dict[str, Any], style: dict[str, Any]) -> str:
    asked = schema.get("x-guidance", {})
    if isinstance(asked, dict):
        schema = schema | {"x-guidance": style | asked}
    return f"%json {json.dumps(schema)}"


def _tag(text: str, tokenizer: MultiverseTokenizer) -> str:
    """A tag in the words of a grammar. llguidance takes the letters of a token in angle brackets for other tokens."""
    ids = tokenizer.tokenize(text)
    return f"<[{ids[0]}]>" if len(ids) == 1 else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
