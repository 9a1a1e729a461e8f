"""Answers held to a grammar: a JSON schema, a regular expression, a choice, a grammar in Lark's or llama.cpp's words.

What an answer thinks is free, blocks and all: the grammar holds for the text after `</Think>`, or for all of it where
the answer begins neither with `<Think>` nor in a thought that its prompt opened. llguidance
(https://github.com/guidance-ai/llguidance) reads grammars and tells which tokens may come next; here stands when they
count.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_multiverse.config.sampling import GrammarKind, SamplingParams
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.structure import StructureVocab, Tag, Thought

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = npt.NDArray[np.int32]
"""[words], a bit for each id, the lowest first: whether it may come next."""

MOST_GRAMMARS = 64
"""Compiled grammars that are kept; beyond them the one that was not asked for longest is compiled anew."""


class Grammars:
    """Compiles the grammars of requests, for one tokenizer.

    Args:
        tokenizer_json: what tokenizer.json holds (`HuggingFaceTokenizer.to_json`).
        vocab: ids of the tags.
        num_ids: ids of the vocabulary.
    """

    def __init__(self, tokenizer_json: str, vocab: StructureVocab, num_ids: int) -> None:
        self._json, self._vocab, self._num_ids = tokenizer_json, vocab, num_ids
        self._tokenizer: LLTokenizer | None = None
        self._first_letters: dict[int, int] = {}
        self._compiled: OrderedDict[tuple[GrammarKind, str], LLMatcher] = OrderedDict()

    def begin(self, sampling: SamplingParams, end_ids: frozenset[int], thought: Thought = "none") -> Guide:
        """The guide of an answer that has not begun.

        Args:
            sampling: whose `grammar` it is held to.
            end_ids: ids that end the answer when they are drawn.
            thought: where the prompt leaves the answer.

        Raises:
            GenerationError: the grammar cannot be read, the message says where; or llguidance is not installed.
        """
        key = sampling.grammar_kind, sampling.grammar
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
            if len(self._compiled) > MOST_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        matcher = self._compiled[key].deep_copy()
        return Guide(matcher, self._vocab, self._num_ids, end_ids, self._first_letters, thought)

    def prepare(self) -> LLTokenizer:
        """Read the tokenizer, which takes a second for a large vocabulary, before a request waits for it.

        Raises:
            GenerationError: llguidance is not installed, or does not know tokenizers of this kind.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise GenerationError(
                "answers are held to grammars by llguidance, which is not installed; install the extra serve"
            ) from error
        if self._tokenizer is None:
            # Where nothing ends a text, a tag stands for that, which no text has: by default it would be id 0.
            end = self._vocab.eos_id
            end = self._vocab.tag_ids[Tag.END_CONCLUSION] if end is None else end
            try:
                self._tokenizer = LLTokenizer(self._json, n_vocab=self._num_ids, eos_token=end)
            except ValueError as error:
                raise GenerationError(
                    f"answers cannot be held to grammars with this tokenizer, which llguidance does not read: {error}"
                ) from error
            self._first_letters = _first_letters(self._json, self._tokenizer)
        return self._tokenizer

    def _compile(self, kind: GrammarKind, text: str) -> LLMatcher:
        tokenizer = self.prepare()
        from llguidance import LLMatcher, grammar_from

        try:
            if kind == "json_schema":
                # Where any blank may stand between its parts, a model can write nothing else until its budget is spent.
                grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
            else:
                grammar = grammar_from(kind, text)
            matcher = LLMatcher(tokenizer, grammar, log_level=0)
        except (ValueError, TypeError) as error:
            raise GenerationError(f"the grammar cannot be read as {kind}: {error}") from error
        if matcher.is_error():
            raise GenerationError(f"the grammar cannot be read as {kind}: {matcher.get_error().strip()}")
        return matcher


class Guide:
    """Which token may come next in one answer, outside of its paths.

    Args:
        matcher: at the beginning of the grammar; nobody else moves it on.
        vocab: ids of the tags.
        num_ids: ids of the vocabulary.
        end_ids: ids that end the answer when they are drawn.
        first_letters: id of a token that stands for no text in a grammar -> id of the first letter of its name.
        thought: where the prompt leaves the answer.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab: StructureVocab,
        num_ids: int,
        end_ids: frozenset[int],
        first_letters: Mapping[int, int],
        thought: Thought = "none",
    ) -> None:
        self._matcher, self._first_letters = matcher, first_letters
        self._think, self._end_think = vocab.tag_ids[Tag.THINK], vocab.tag_ids[Tag.END_THINK]
        self._tags, self._ends = list(vocab.tag_of), [token for token in end_ids if token < num_ids]
        self._words = -(-num_ids // 32)
        self._begun, self._thinks = thought != "none", thought == "open"
        self.is_complete = False
        """Whether the grammar allows no further text."""
        self.error = ""
        """Why the answer cannot go on."""

    @property
    def holds(self) -> bool:
        """Whether the next token is held to the grammar: not in a thought."""
        return not self._thinks

    def push(self, token: int) -> None:
        """Take the next token of the answer."""
        if not self._begun:
            self._begun = True
            self._thinks = token == self._think
            if self._thinks:
                return
        if self._thinks:
            self._thinks = token != self._end_think
            return
        if self._matcher.consume_token(token):
            self.is_complete = self._matcher.is_stopped()
        else:
            self.error = f"the text breaks its grammar, or that is too large: {self._matcher.get_error().strip()}"

    def mask(self) -> Mask:
        """The ids that may come next, where it holds. Tags are text of no grammar; an answer ends where that may."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)[: self._words].copy()
        if self._matcher.is_error():  # found by the next token
            allowed[:] = -1
        # Where only one text can come next, the mask is its first token, which the matcher may not take
        # (findings/llguidance_refuses_a_token_that_it_forces.sh). That text is written in letters then.
        only = _only(allowed)
        may_end = self._matcher.is_accepting()
        if only in self._first_letters and not may_end and not self._matcher.validate_tokens([only]):
            _set(allowed, [only], False)
            _set(allowed, [self._first_letters[only]], True)
        _set(allowed, self._tags, False)
        _set(allowed, self._ends, may_end)
        if not self._begun:
            _set(allowed, [self._think], True)
        return allowed


def _set(mask: Mask, ids: list[int], value: bool) -> None:
    bits = mask.view(np.uint32)
    for token in ids:
        bit = np.uint32(1 << token % 32)
        bits[token // 32] = bits[token // 32] | bit if value else bits[token // 32] & ~bit


def _only(mask: Mask) -> int:
    """The one id that is set; -1 where there are others, or none."""
    if np.count_nonzero(mask) != 1:
        return -1
    word = int(np.flatnonzero(mask)[0])
    bits = int(mask.view(np.uint32)[word])
    return word * 32 + bits.bit_length() - 1 if bits.bit_count() == 1 else -1


def _first_letters(tokenizer_json: str, tokenizer: LLTokenizer) -> dict[int, int]:
    added = json.loads(tokenizer_json).get("added_tokens") or []
    names = {entry["id"]: entry["content"] for entry in added if tokenizer.is_special_token(entry["id"])}
    return {token: tokenizer.tokenize_bytes(name[:1].encode())[0] for token, name in names.items()}
