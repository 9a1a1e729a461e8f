"""Tokenizers under Megatron's names, with the twelve structure tags as one token each.

Both kinds decode exactly what they encoded, tags included. (The decoders that come with the libraries drop special
tokens or the blanks around them.)
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_multiverse.config import TokenizerType
from megatron_multiverse.data.chat_templates import fix_date, named_templates, writes_date
from megatron_multiverse.data.hf_tokenizer_files import (
    SPECIAL_TOKENS,
    completed_config,
    content,
    kept_form,
    load_hf_backend,
)
from megatron_multiverse.data.input_files import refuse_lfs_pointer
from megatron_multiverse.data.sentencepiece_model import add_user_defined_symbols, keep_blanks
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure import TAGS, StructureVocab, cut_at_labels

_PROBE = "\n".join(TAGS)
_CHUNK_CHARACTERS = 16_384
_TURN_TOKEN = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_[a-z_]+>|\[/?[A-Z][A-Z_]+\]")
"""How models write the tokens around turns. sentencepiece calls them user defined, as it does any piece that is to stay
whole, such as runs of newlines or ``<table>``, so their form has to tell."""


class MultiverseTokenizer(ABC):
    """What the rest of the package knows of a tokenizer.

    Attributes:
        id_to_text: for each id the exact text it decodes to ("\ufffd" for a part of a character).
        structure_vocab: ids of tags, newline and label pieces.
        eod: id that ends a document, or None if the tokenizer has none.
        chat_templates: jinja templates that wrap a user turn, by name.
        control_tokens: ids, with their texts, that mean something to the programs around a model, such as
            ``<|im_end|>``, and that text can spell. The tags are none.
        path: what it was read from, as given.
        added_tags: the tags that were not in the vocabulary as it was read, and got ids after it.
    """

    added_tags: tuple[str, ...] = ()
    eod: int | None = None
    chat_templates: dict[str, str] = {}  # noqa: RUF012 (never changed)
    control_tokens: dict[int, str] = {}  # noqa: RUF012
    id_to_text: list[str]
    structure_vocab: StructureVocab
    path: Path

    @abstractmethod
    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; no begin or end token is added."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Exact text of the ids, tags included."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with its tags; `build_tokenizer` reads the folder back."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes whenever the same text could give other ids."""

    @property
    @abstractmethod
    def pad(self) -> int:
        """Id that fills up a batch; never trained on. Raises ConfigError if the tokenizer names none."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of one text; no begin or end token is added."""
        return self.tokenize_batch([text])[0]

    def tokenize_response(self, text: str) -> list[int]:
        """Token ids of a response, each label in tokens that hold nothing else, which is how the engine writes it."""
        return [token for ids in self.tokenize_batch(cut_at_labels(text)) for token in ids]

    def keeps(self, text: str, ids: Sequence[int]) -> bool:
        """Whether `ids`, the tokens of `text`, decode to it."""
        return self.detokenize(ids) == text

    @property
    def chat_template(self) -> str | None:
        """The template that is used: the one called "default"."""
        return self.chat_templates.get("default")

    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches the control tokens in a text; None if there are none."""
        longest_first = sorted(self.control_tokens.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @property
    def vocab_size(self) -> int:
        """Number of ids: tags count, the padding of the embedding table (`config.pad_vocab_size`) does not."""
        return len(self.id_to_text)

    def render_chat(self, turns: str | Sequence[dict[str, str]], *, date: datetime.date | None = None) -> str:
        """The text of a conversation up to where the assistant starts, by the chat template.

        Args:
            turns: each with role and content; a text is the one turn of a user.
            date: the date that a template writes; None lets it write today's.

        Raises:
            ConfigError: the tokenizer has no chat template, or none called "default".
        """
        template = self.chat_template
        if template is None:
            names = ", ".join(sorted(self.chat_templates))
            has = f"has chat templates called {names}, but none called default" if names else "has no chat template"
            raise ConfigError(f"the tokenizer {has}; name one so, or use --chat-template never")
        dates: dict[str, Any] = {}
        if date is not None and writes_date(template):
            template, dates = fix_date(template, date)
        messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        return self.render_conversation(messages, template=template, **dates)

    def render_conversation(self, messages: Sequence[dict[str, Any]], *, template: str, **variables: Any) -> str:
        """The text of a conversation, by default up to where the assistant starts. Templates run in a sandbox.

        Args:
            messages: turns, each with role and content.
            template: jinja, as tokenizer_config.json has it.
            variables: further names in the template, `add_generation_prompt` and `continue_final_message` included.

        Raises:
            Exception: whatever the template raises.
        """
        # The template language has helpers (strftime_now, raise_exception) that transformers defines.
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {"add_generation_prompt": True} | variables | self.special_tokens()
        rendered: Any = render_jinja_template(conversations=[list(messages)], chat_template=template, **names)
        return str(rendered[0][0])

    def special_tokens(self) -> dict[str, str]:
        """Texts of the tokens that begin, end and fill sequences, under the names that chat templates have for them."""
        return {} if self.eod is None else {"eos_token": self.id_to_text[self.eod]}

    def _finish(self, id_to_text: list[str]) -> None:
        """Keep the table after a check: encoding must give each tag one token, and decoding must give the text back."""
        self.id_to_text = id_to_text
        found = self.tokenize(_PROBE)
        if self.detokenize(found) != _PROBE or len(found) != 2 * len(TAGS) - 1:
            pieces = [id_to_text[token] for token in found]
            raise ConfigError(
                f"the tokenizer must keep each tag and each newline as one token, but {_PROBE[:25]!r}... becomes "
                f"{pieces[:5]}... and decodes to {self.detokenize(found)[:40]!r}...; use a byte-level BPE or a "
                "sentencepiece model, without a normalization that changes newlines"
            )
        # Some vocabularies have two tokens for a newline, a byte and a piece; only the one that encoding uses counts.
        used, fixed = set(found), {*TAGS, "\n"}
        pieces_by_id = {k: text for k, text in enumerate(id_to_text) if text not in fixed or k in used}
        self.structure_vocab = StructureVocab.from_pieces(pieces_by_id, eos_id=self.eod)


class HuggingFaceTokenizer(MultiverseTokenizer):
    """A fast Hugging Face tokenizer: a folder with tokenizer.json, or a hub name.

    A local tokenizer.json is read by the `tokenizers` library alone; `transformers` (seconds to import) is needed
    only for hub names, for folders without that file and for chat templates.
    """

    def __init__(self, tokenizer_model: str | Path) -> None:
        from tokenizers import AddedToken

        self.path = Path(tokenizer_model)
        self._backend, self._config = load_hf_backend(self.path)
        self._json: str | None = None
        self._backend.no_padding()
        self._backend.no_truncation()
        known = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        for tag in TAGS:
            if tag in known and (known[tag].lstrip or known[tag].rstrip):
                raise ConfigError(f"{tokenizer_model}: the token {tag} swallows blanks beside it (lstrip/rstrip)")
        missing = [tag for tag in TAGS if tag not in known]
        _refuse_gaps(self._backend, len(missing), tokenizer_model)
        self.added_tags = tuple(missing)
        self._backend.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in missing])
        self.eod = self._special_id("eos_token")
        self.chat_templates = named_templates(self._config.get("chat_template"))
        self._form = kept_form(self._backend)
        self._finish(_texts_of_ids(self._backend))
        unknown = content(self._config.get("unk_token"))
        self.control_tokens = {
            self._backend.token_to_id(text): text
            for text, token in known.items()
            if token.special and text not in (*TAGS, unknown)
        }
        if self.eod is not None:
            self.control_tokens.setdefault(self.eod, self.id_to_text[self.eod])

    def keeps(self, text: str, ids: Sequence[int]) -> bool:
        if self._form is None:
            return super().keeps(text, ids)
        return not self._form or text.isascii() or unicodedata.is_normalized(self._form, text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for start, end in _chunks(texts):
            encodings = self._backend.encode_batch_fast(list(texts[start:end]), add_special_tokens=False)
            ids += [encoding.ids for encoding in encodings]
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def to_json(self) -> str:
        """The content of a tokenizer.json, tags included."""
        if self._json is None:
            self._json = self._backend.to_str()
        return self._json

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._backend.save(str(Path(folder) / "tokenizer.json"))
        config = completed_config(self._config, self._backend.get_added_tokens_decoder())
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (Path(folder) / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        parts = [self.to_json(), self.chat_template or ""]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def pad(self) -> int:
        pad = self._special_id("pad_token")
        if pad is None:
            pad = self.eod
        if pad is None:
            raise ConfigError("the tokenizer names neither pad_token nor eos_token in tokenizer_config.json")
        return pad

    def _special_id(self, name: str) -> int | None:
        text = content(self._config.get(name))
        return None if text is None else self._backend.token_to_id(text)

    def special_tokens(self) -> dict[str, str]:
        return {name: content(self._config.get(name)) or "" for name in SPECIAL_TOKENS}


class SentencePieceTokenizer(MultiverseTokenizer):
    """A sentencepiece model file; tags (and the newline, if it has no piece) are added as user defined symbols.

    The blank that sentencepiece puts before every text is switched off: text is tokenized exactly as given.
    """

    def __init__(self, tokenizer_model: str | Path) -> None:
        import sentencepiece

        self.path = path = Path(tokenizer_model)
        if path.is_dir():
            path = path / "tokenizer.model"
        if not path.is_file():
            raise ConfigError(f"no sentencepiece model at {path}; --tokenizer-model takes its file or folder")
        refuse_lfs_pointer(path)
        proto = keep_blanks(path.read_bytes())
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{path} is damaged or no sentencepiece model ({error}): fetch it again") from error
        missing = [tag for tag in TAGS if _is_unknown(model, tag)]
        self.added_tags = tuple(missing)
        for tag in set(TAGS) - set(missing):
            if model.IsControl(model.PieceToId(tag)):
                raise ConfigError(
                    f"{path}: {tag} is a control symbol, which text cannot contain; train it as user defined"
                )
        if model.decode(model.encode("\n")) != "\n":  # unknown, or normalized to a blank
            missing.append("\n")
        self._proto = add_user_defined_symbols(proto, missing)
        self._model = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        self.eod = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self._finish([self._text_of(token) for token in range(self._model.GetPieceSize())])
        turns = {token: text for token, text in enumerate(self.id_to_text) if _TURN_TOKEN.fullmatch(text)}
        # sentencepiece never reads a control symbol out of a text.
        self.control_tokens = {token: text for token, text in turns.items() if self.tokenize(text) == [token]}

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(token) for token in ids]))

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(self._proto)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._proto).hexdigest()

    @property
    def pad(self) -> int:
        if self._model.pad_id() >= 0:
            return int(self._model.pad_id())
        return int(self.eod if self.eod is not None else self._model.unk_id())

    def _text_of(self, token: int) -> str:
        piece = str(self._model.IdToPiece(token))
        if self._model.IsByte(token):
            return bytes([int(piece[3:5], 16)]).decode("ascii", errors="replace")
        if self._model.IsControl(token) or self._model.IsUnknown(token):
            return piece
        return piece.replace("\u2581", " ")


def _refuse_gaps(backend: Any, missing: int, name: str | Path) -> None:
    """The library gives new tokens the ids from the number of tokens on, whether or not others have them."""
    size = backend.get_vocab_size(with_added_tokens=True)
    taken = [text for k in range(missing) if (text := backend.id_to_token(size + k)) is not None]
    if taken:
        raise ConfigError(
            f"{name}: its vocabulary has gaps between its ids, so that adding the tags would give them ids of other "
            f"tokens: {', '.join(taken)}. Add the {len(TAGS)} tags to its added_tokens yourself, with ids of their own"
        )


def _texts_of_ids(backend: Any) -> list[str]:
    """The text of each id. Each is decoded after a tag: alone it would begin a text, where decoders drop a blank."""
    anchor, anchor_id = TAGS[0], backend.token_to_id(TAGS[0])
    # Usually there are as many ids as tokens, and one call decodes them all, each after a tag, in half the time.
    count = backend.get_vocab_size(with_added_tokens=True)
    alternating = np.full((count, 2), anchor_id)
    alternating[:, 1] = np.arange(count)
    texts: list[str] = backend.decode(alternating.ravel().tolist(), skip_special_tokens=False).split(anchor)[1:]
    texts[anchor_id : anchor_id + 2] = [anchor]
    if len(texts) == count and all(texts):
        return texts
    count = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    decoded = backend.decode_batch([[anchor_id, token] for token in range(count)], skip_special_tokens=False)
    return [text.removeprefix(anchor) for text in decoded]


def build_tokenizer(tokenizer_type: TokenizerType, tokenizer_model: str | Path) -> MultiverseTokenizer:
    """Load a tokenizer by Megatron's flags.

    Args:
        tokenizer_type: "HuggingFaceTokenizer" or "SentencePieceTokenizer".
        tokenizer_model: folder, file or (Hugging Face) hub name.

    Raises:
        ConfigError: no name, unknown type, unreadable model, or one that cannot keep tags and newlines as tokens.
    """
    if not str(tokenizer_model):
        raise ConfigError(
            "tokenizer_model is empty: name the tokenizer, a folder with tokenizer.json, a hub name, or with "
            "SentencePieceTokenizer a model file"
        )
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(tokenizer_model)
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(tokenizer_model)
    raise ConfigError(f"tokenizer_type ({tokenizer_type}) must be one of {', '.join(get_args(TokenizerType))}")


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of texts to encode in one call.

    The library's encodings are some fifty times the size of their text. Large batches of them do not fit into the
    processor's cache, which made long rows 7 % slower than row by row.
    """
    start = size = 0
    for k, text in enumerate(texts):
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield start, k + 1
            start, size = k + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _is_unknown(model: Any, piece: str) -> bool:
    return bool(model.PieceToId(piece) == model.unk_id())
