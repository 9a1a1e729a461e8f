"""The tokenizer that lies in a checkpoint, and another one held against it: ids have to mean the same text."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_multiverse.checkpoints.control_tokens import tokenizer_folder
from megatron_multiverse.checkpoints.formats.json_files import read_json_object
from megatron_multiverse.checkpoints.protocols import Source
from megatron_multiverse.checkpoints.run_files import TOKENIZER_RECORD_FILE
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure import TAGS


def tokenizer_record(tokenizer: MultiverseTokenizer) -> dict[str, Any]:
    """What a checkpoint says of its tokenizer, as JSON values."""
    return {
        "tokenizer_type": type(tokenizer).__name__,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "tag_ids": dict(zip(TAGS, tokenizer.structure_vocab.tag_ids, strict=True)),
    }


def tokenizer_of(source: Source, known: MultiverseTokenizer) -> MultiverseTokenizer | None:
    """The tokenizer of a checkpoint; None if it has none.

    Args:
        source: the checkpoint.
        known: returned where it was read from the same folder.

    Raises:
        ConfigError: it is not the one that the checkpoint was written with.
    """
    folder = tokenizer_folder(source)
    if folder is None:
        return None
    if _folder_of(known) == folder.resolve():
        own = known
    else:
        has_json = (folder / "tokenizer.json").is_file()
        own = build_tokenizer("HuggingFaceTokenizer" if has_json else "SentencePieceTokenizer", folder)
    _check_record(folder, own)
    return own


def _folder_of(tokenizer: MultiverseTokenizer) -> Path:
    path = tokenizer.path.resolve()
    return path if path.is_dir() else path.parent


def _check_record(folder: Path, tokenizer: MultiverseTokenizer) -> None:
    """Not by the fingerprint, which changes with the version of the library that writes the tokenizer down."""
    file = folder / TOKENIZER_RECORD_FILE
    if not file.is_file():
        return
    written, now = read_json_object(file), tokenizer_record(tokenizer)
    names = [name for name in ("tokenizer_type", "vocab_size", "eod", "tag_ids") if written.get(name) != now[name]]
    if names:
        raise ConfigError(
            f"the tokenizer in {folder} is not the one that the checkpoint was written with ({file.name} has another "
            f"{', '.join(names)}): copy the tokenizer of the run there again"
        )


def differing_id(own: MultiverseTokenizer, other: MultiverseTokenizer) -> tuple[int, str | None, str | None] | None:
    """The first id that means different texts: id, text of `own`, text of `other`; None for an id that one lacks."""
    pairs = enumerate(zip_longest(own.id_to_text, other.id_to_text))
    return next(((k, one, two) for k, (one, two) in pairs if one != two), None)
