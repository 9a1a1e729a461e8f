"""Prompts and conversations as token ids, and where the earlier answers of a conversation stand in them."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from jinja2 import TemplateError

from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.data.turns import Turn, read_turns, refuse_hidden_calls, with_suffix
from megatron_multiverse.errors import DataError, GenerationError, MultiverseError
from megatron_multiverse.structure import Tag
from megatron_multiverse.structure.trajectory import cut_at_labels

Messages: TypeAlias = list[Turn]
"""Turns in order, each with role and content."""

Prompts: TypeAlias = list[str | Messages | MultiverseError]
"""Prompts and conversations in order; in place of a row that holds none, what is wrong with it."""

Spans: TypeAlias = list[tuple[int, int]]
"""[start, end) of each earlier answer."""


def check_messages(value: object) -> Messages:
    """The messages of a row.

    Raises:
        DataError: they are no turns that an answer can follow.
    """
    turns = read_turns(value, "messages")
    if not turns or turns[-1]["role"] == "assistant":
        raise DataError('"messages" must end with the turn that is to be answered')
    return turns


def cut_at_answers(text: str, messages: Sequence[Mapping[str, Any]]) -> tuple[list[str], Spans]:
    """A conversation in pieces to be tokenized one by one, so that each earlier answer, and each label in it, begins
    and ends where a token does; and which pieces [first, last) make up each answer.

    Args:
        text: what a chat template made of the messages.
        messages: turns with role and content.

    Raises:
        GenerationError: the template does not show a turn as it is, or it shows blocks of a thought that stands apart.
    """
    pieces: list[str] = []
    answers: Spans = []
    done = 0
    for message in messages:
        content = str(message["content"])
        start = text.find(content, done)
        if start < 0:
            raise GenerationError("replay_structure: this chat template changes earlier turns; leave it out")
        thought = str(message.get("reasoning_content") or "").strip()
        if Tag.PARALLEL.text in thought and thought in text:
            raise GenerationError(
                "replay_structure: the blocks of a reasoning_content are not laid out again; give the thought in the "
                "content of its turn, with its tags, or leave replay_structure out"
            )
        if message["role"] == "assistant" and content:
            pieces.append(text[done:start])
            cut = cut_at_labels(content)
            answers.append((len(pieces), len(pieces) + len(cut)))
            pieces += cut
            done = start + len(content)
    return [*pieces, text[done:]], answers


def render_prompt(
    prompt: str | Messages | MultiverseError,
    tokenizer: MultiverseTokenizer,
    *,
    suffix: str,
    date: datetime.date | None,
    replay: bool,
) -> tuple[list[str], Spans] | MultiverseError:
    """The text of a prompt as `cut_at_answers` cuts it, or why it has none.

    Args:
        prompt: a conversation needs `date`.
        tokenizer: its chat template is used where `date` is given.
        suffix: put after the prompt, or after the last turn of the user.
        date: what a chat template writes; None: no template.
        replay: whether earlier answers are to be laid out again.
    """
    try:
        if isinstance(prompt, str):
            text = prompt + suffix
            return [text if date is None else tokenizer.render_chat(text, date=date)], []
        if isinstance(prompt, MultiverseError):
            return prompt
        turns = with_suffix(prompt, suffix)
        text = tokenizer.render_chat(turns, date=date)
        refuse_hidden_calls(turns, text, partial(tokenizer.render_chat, date=date))
        return cut_at_answers(text, turns) if replay else ([text], [])
    except MultiverseError as error:
        return error
    except TemplateError as error:
        return DataError(f"the chat template refuses it: {error}")


def encode(
    texts: Sequence[tuple[list[str], Spans] | MultiverseError], tokenizer: MultiverseTokenizer
) -> list[tuple[list[int], tuple[tuple[int, int], ...]]]:
    """Token ids of each text, and the ids [start, end) of its earlier answers; of an error none."""
    cut: list[tuple[list[str], Spans]] = [([], []) if isinstance(text, MultiverseError) else text for text in texts]
    tokenized = iter(tokenizer.tokenize_batch([piece for pieces, _ in cut for piece in pieces]))
    encoded = []
    for pieces, answers in cut:
        parts = [next(tokenized) for _ in pieces]
        ends = [0, *itertools.accumulate(map(len, parts))]
        ids = list(itertools.chain.from_iterable(parts))
        encoded.append((ids, tuple((ends[first], ends[last]) for first, last in answers)))
    return encoded
