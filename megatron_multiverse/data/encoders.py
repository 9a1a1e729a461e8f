"""Texts to token ids at full speed: gigatoken where it gives the ids of the `tokenizers` library, else that library.

gigatoken is several times faster, but young, and it cuts words by code of its own for each known tokenizer. What the
`tokenizers` library gives is right by definition. Both read a sample of the run's own rows before the run starts, and
texts chosen at random while it runs; at the first difference everything that gigatoken wrote is done again without it.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer, MultiverseTokenizer
from megatron_multiverse.errors import DataError, first_line
from megatron_multiverse.structure import TAGS

logger = logging.getLogger(__name__)

IdArray = npt.NDArray[np.integer]
EncoderChoice = Literal["auto", "tokenizers"]

# The tokenizers library takes many times as long, so only a small share of the text is encoded a second time.
_CHECKED_SHARE, _CHECKED_CHARACTERS = 1 / 2048, 4096
_MAX_GROWTH_BYTES = 256 << 20
# Runs of blanks and digits, line ends, contractions, words longer than what caches hold, control tokens, all tags.
_HARD_TEXT = (
    "  \t x\r\n\r\n  y 1234567 3.14e-10 don't WE'LL \x1f $\\frac{1}{2}$ donaudampfschifffahrtsgesellschaft ----====__ "
    "<|im_end|></s> <Path>\n2.1:**x** \n\n"
) + "".join(TAGS)
# Where a character may be read in another way: beside letters, digits, blanks, line ends and itself, in a contraction,
# and between two marks that Unicode's normal forms sort around it if it is a mark too.
_CHARACTER_TEXT = "a{0}b1{0}2 {0} {0}{0}\n{0}\r{0}.{0} a\u0345{0}a{0}\u0334 x'{0}e x'l{0}"
_UNKNOWN, _EQUAL, _DIFFERENT = 0, 1, 2


class DifferentIds(DataError):
    """gigatoken gave other ids than the `tokenizers` library."""


class Encoder(Protocol):
    """Turns texts into ids.

    Attributes:
        name: what shards are marked with.
    """

    name: str

    def encode(self, texts: Sequence[str]) -> list[IdArray]:
        """Ids of each text, [N]; no begin or end token is added."""
        ...


class PlainEncoder:
    """The tokenizer's own library."""

    name = "plain"

    def __init__(self, tokenizer: MultiverseTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[IdArray]:
        return [np.array(ids, dtype=np.uint32) for ids in self._tokenizer.tokenize_batch(texts)]


class GigatokenEncoder:
    """gigatoken, with the tokenizer's own library beside it to check by.

    Args:
        tokenizer: gives the ids that are right.
        tokenizer_json: its content, as in a tokenizer.json.

    Raises:
        ImportError: gigatoken is not installed.
        ValueError: gigatoken does not know this kind of tokenizer.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: MultiverseTokenizer, tokenizer_json: str) -> None:
        self._tokenizer = tokenizer
        self._json = tokenizer_json
        self._plain = PlainEncoder(tokenizer)
        self._random = random.Random()
        self._character_status = np.full(sys.maxunicode + 1, _UNKNOWN, dtype=np.uint8)
        self._character_status[:128] = _EQUAL
        self._load()

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import BPETokenizer, load_hf_json

        self._fast: Any = None  # frees the old one first
        loaded = load_hf_json(self._json)
        # Its other class starts threads while it loads, which hangs in a forked worker whose parent has done so too.
        if not isinstance(loaded, BPETokenizer):
            raise ValueError("not a byte-level BPE")
        self._fast = loaded
        self._first_rss: int | None = None

    def encode(self, texts: Sequence[str]) -> list[IdArray]:
        """Ids of each text.

        Raises:
            DifferentIds: a stretch of a text that was checked has other ids.
        """
        encoded = []
        for text in texts:
            if self._is_for_plain(text):
                encoded += self._plain.encode([text])
                continue
            encoded.append(self._encode(text))
            if self._random.random() < len(text) * _CHECKED_SHARE / _CHECKED_CHARACTERS:
                start = self._random.randrange(max(len(text) - _CHECKED_CHARACTERS, 0) + 1)
                self.check(text[start : start + _CHECKED_CHARACTERS])
        self._bound_memory()
        return encoded

    def _encode(self, text: str) -> IdArray:
        try:
            ids: IdArray = self._fast.encode(text)
        except BaseException as error:  # a panic inside the library is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise DifferentIds(f"gigatoken cannot read a text ({error})") from error
        return ids

    def check(self, text: str) -> None:
        """Compare with the tokenizer's own library, unless the text is left to it anyway.

        Raises:
            DifferentIds: it gives other ids.
        """
        if not self._is_for_plain(text):
            self._compare(text)

    def _is_for_plain(self, text: str) -> bool:
        """Whether a text holds a character on which the libraries differ; each is tried when it is first met.

        They follow different versions of Unicode: tokenizers 0.23 does not sort marks that are younger than version 10,
        such as U+07FD, when it normalizes.
        """
        if text.isascii():
            return False
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        status = self._character_status[characters]
        if not status.all():
            for code in np.unique(characters[status == _UNKNOWN]).tolist():
                self._character_status[code] = self._try_character(chr(code))
            status = self._character_status[characters]
        return bool(status.max() == _DIFFERENT)

    def _try_character(self, character: str) -> int:
        try:
            self._compare(_CHARACTER_TEXT.format(character))
        except DifferentIds:
            return _DIFFERENT
        return _EQUAL

    def _compare(self, text: str) -> None:
        ids = self._encode(text)
        try:
            right = np.array(self._tokenizer.tokenize(text), dtype=np.uint32)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise DifferentIds(f"gigatoken reads a text that tokenizers cannot read ({error})") from error
        if np.array_equal(ids, right):
            return
        common = min(len(ids), len(right))
        place = int(np.argmax(np.append(ids[:common] != right[:common], True)))
        before = self._tokenizer.detokenize(right[:place].tolist())
        raise DifferentIds(
            f"gigatoken gives {ids[place : place + 4].tolist()} where tokenizers gives "
            f"{right[place : place + 4].tolist()}, at {text[len(before) : len(before) + 20]!r}"
        )

    def _bound_memory(self) -> None:
        """Start again with empty caches when they have grown: gigatoken keeps every word it has ever seen."""
        import psutil

        rss = psutil.Process().memory_info().rss
        if self._first_rss is None:  # in a forked worker: its first batch
            self._first_rss = rss
        elif rss - self._first_rss > _MAX_GROWTH_BYTES:
            self._load()


def choose_encoder(tokenizer: MultiverseTokenizer, sample: Callable[[], Sequence[str]]) -> Encoder:
    """The fastest encoder that gives the right ids; the log says which, and why not gigatoken if not.

    Args:
        tokenizer: gives the ids that are right.
        sample: texts of the run, on which both are compared.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return PlainEncoder(tokenizer)
    try:
        fast = GigatokenEncoder(tokenizer, tokenizer.to_json())
        for text in (_HARD_TEXT, *sample()):
            fast.check(text)
    except ImportError:
        reason = "gigatoken, which is several times faster, is not installed: pip install 'megatron-multiverse[fast]'"
    except DifferentIds as error:
        reason = str(error)
    except Exception as error:  # it raises errors of several kinds where it does not know a kind of tokenizer
        # After the first line comes a place in its own source.
        reason = f"gigatoken does not know this tokenizer ({first_line(error)})"
    else:
        logger.info("encoding with gigatoken, whose ids are those of tokenizers on a sample of the rows")
        return fast
    logger.info("encoding with tokenizers: %s", reason)
    return PlainEncoder(tokenizer)
