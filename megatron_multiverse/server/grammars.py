"""What an answer must be: the fields in which OpenAI, vLLM and SGLang say it, as a grammar of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_multiverse.config.sampling import GrammarKind
from megatron_multiverse.server.errors import refuse

MOST_CHARACTERS = 65_536
"""Of a grammar. All answers wait while one is compiled."""

Grammar = tuple[GrammarKind, str]
"""Its kind and its text, see `SamplingParams.grammar`."""

_KINDS: dict[str, GrammarKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json_schema",
    "ebnf": "grammar",
}
_ANY_OBJECT: Grammar = ("json_schema", '{"type": "object"}')


def grammar_of(fields: Mapping[str, Any]) -> Grammar | None:
    """The grammar that a request asks for; None if it asks for none.

    Args:
        fields: `response_format` (OpenAI), `structured_outputs` and `guided_*` (vLLM), `json_schema`, `regex` and
            `ebnf` (SGLang), as they came.

    Raises:
        ApiError: 400: more than one is given, or one that is not served.
    """
    found: dict[str, Grammar] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name == "response_format":
            grammar = _response_format(value)
        elif name == "structured_outputs":
            grammar = _structured_outputs(value)
        else:
            grammar = _grammar(name, name, value)
        if grammar is not None:
            found[name] = grammar
    if len(found) > 1:
        first, second, *_ = found
        raise refuse(second, f"not together with {first}; an answer is held to one grammar")
    for name, (_, text) in found.items():
        if len(text) > MOST_CHARACTERS:
            raise refuse(name, f"{len(text)} characters; at most {MOST_CHARACTERS} are allowed")
    return next(iter(found.values()), None)


def _response_format(value: Mapping[str, Any]) -> Grammar | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if schema is None:
            raise refuse("response_format", "type json_schema needs json_schema.schema, a JSON schema")
        return _grammar("response_format", "json_schema", schema)
    raise refuse("response_format", f"type {kind!r:.40}; text, json_object and json_schema are served")


def _structured_outputs(value: Mapping[str, Any]) -> Grammar | None:
    given = {name: inner for name, inner in value.items() if inner not in (None, False)}
    served = ["json", "regex", "choice", "grammar", "json_object"]
    if unknown := given.keys() - served:
        raise refuse("structured_outputs", f"{sorted(unknown)[0][:40]!r}; {', '.join(served)} are served")
    if len(given) > 1:
        raise refuse("structured_outputs", f"{' and '.join(sorted(given))}; give one of them")
    for name, inner in given.items():
        return _ANY_OBJECT if name == "json_object" else _grammar("structured_outputs", name, inner)
    return None


def _grammar(field: str, name: str, value: Any) -> Grammar:
    """The grammar that a value means: texts as they are, but for a choice, which is a list of texts."""
    kind = _KINDS[name]
    if kind == "choice":
        if not (isinstance(value, list) and value and all(isinstance(text, str) and text for text in value)):
            raise refuse(field, "a choice is a list of texts of at least one character")
        return kind, json.dumps(value)
    if isinstance(value, str) and value:
        return kind, value
    if kind == "json_schema" and isinstance(value, dict | bool):
        return kind, json.dumps(value)
    wanted = "a JSON schema, as an object or a text" if kind == "json_schema" else "a text of at least one character"
    raise refuse(field, f"{name} must be {wanted}")
