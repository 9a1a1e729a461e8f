"""Log-probabilities in the two shapes that OpenAI has for them.

They are those of the model, before temperature and filters. Tokens that the engine forced were not drawn and have none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.inference.text.result import Result, TopLogprobs


@dataclass(frozen=True)
class TokenLogprobs:
    """One token, and what was likely in its place."""

    token: int
    logprob: float | None
    """None for a token that was not drawn."""
    top: TopLogprobs
    """The most likely first; the token itself need not be among them."""


def of_answer(result: Result) -> list[TokenLogprobs]:
    """Those of the tokens of an answer, in text order."""
    tops = result.top_logprobs or [None] * len(result.token_ids)
    return [
        TokenLogprobs(token, logprob, top or [])
        for token, logprob, top in zip(result.token_ids, result.logprobs, tops, strict=True)
    ]


def of_prompt(result: Result) -> list[TokenLogprobs]:
    """Those of the tokens of its prompt; the first has none, nor have those that an answer cut short did not read."""
    logprobs, tops = result.prompt_logprobs or [], result.prompt_top_logprobs or []
    return [
        TokenLogprobs(token, logprob, top or [])
        for token, logprob, top in itertools.zip_longest(result.prompt_ids, logprobs, tops)
    ]


def completion_object(
    entries: Sequence[TokenLogprobs],
    tokenizer: MultiverseTokenizer,
    *,
    as_ids: bool = False,
    is_empty: bool = False,
    offset: int = 0,
) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/completions: four lists, one entry for each token.

    The chosen token is always among its alternatives, with the very same number: evaluators compare the two to find out
    whether it was the most likely one.

    Args:
        entries: the tokens.
        tokenizer: of the model.
        as_ids: name tokens by their ids, as `token_id:5`.
        is_empty: the answer ended with its first token, which is no part of it. It gets an entry without text:
            evaluators ask for one token after the prompt, and drop the last entry without looking.
        offset: characters before the first of them, in a stream.
    """
    texts = [tokenizer.id_to_text[entry.token] for entry in entries]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    found: dict[str, list[Any]] = {
        "tokens": [_id_name(entry.token) for entry in entries] if as_ids else texts,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_by_name(entry, tokenizer, as_ids=as_ids) for entry in entries],
        "text_offset": offsets,
    }
    if is_empty:
        for name, last in {"tokens": "", "token_logprobs": None, "top_logprobs": None, "text_offset": offset}.items():
            found[name].append(last)
    return found


def chat_object(
    entries: Sequence[TokenLogprobs], tokenizer: MultiverseTokenizer, *, as_ids: bool = False
) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions; see `completion_object`."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.id_to_text[token]
        return {"token": _id_name(token) if as_ids else text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            named(entry.token, entry.logprob) | {"top_logprobs": [named(*pair) for pair in entry.top]}
            for entry in entries
        ]
    }


def _by_name(entry: TokenLogprobs, tokenizer: MultiverseTokenizer, *, as_ids: bool) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in [(entry.token, entry.logprob), *(pair for pair in entry.top if pair[0] != entry.token)]:
        text = tokenizer.id_to_text[token]
        # Parts of characters all have the same text.
        found[_id_name(token) if as_ids or text in found else text] = logprob
    return found


def _id_name(token: int) -> str:
    """vLLM's name of a token whose text may be that of others, too."""
    return f"token_id:{token}"
