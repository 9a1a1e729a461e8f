"""Writes the quickstart's tokenizer: bytes, the task's few words and signs, and the twelve structure tags.

A number is always a row of single digits, and the blank before it always belongs to the token before, so that
``A = 1550`` is the same tokens wherever it stands. Any other text falls apart into bytes, losing nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_multiverse.structure import TAGS

SIGNS = (" + ", " - ", " * ", " = ", "; ")
COLUMN_WORDS = ("ones: ", "tens: ", "hundreds: ", "thousands: ")
STEP_WORDS = (", write ", ", carry ", ", borrow ", ", left ")
PROMPT_WORDS = ("Work", " out", " Think", " step", " by", " and", " in", " parallel", " before", " answering")
REPLY_WORDS = ("Let's", " think", "Answer")
PIECES = SIGNS + COLUMN_WORDS + STEP_WORDS + PROMPT_WORDS + REPLY_WORDS
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

# In order: newline; digit; sign with its blanks; words that lead to a number, with the blank; what leads to a
# name; the name; other words with the blank before; any other character.
SPLIT = (
    r"\n|\d| [-+*=] |, [a-z]+ (?=\d)|[a-z]+: (?=\d)|; (?=[A-Z])| (?=[A-Z][\d ]*=)|[A-Z](?=[\d ]*=)"
    r"| ?[A-Za-z']+|[\s\S]"
)


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Where the tokenizer goes."""

    output: Path = Path(__file__).parent / "model"
    """Folder for tokenizer.json, tokenizer_config.json and special_tokens_map.json."""


def build_tokenizer(folder: Path) -> None:
    """Write the three tokenizer files into `folder` (about 300 tokens)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["".join(token for token, _ in byte_level.pre_tokenize_str(piece)) for piece in PIECES]
    vocab = {token: index for index, token in enumerate([*alphabet, *pieces])}
    # No merges: a piece of the split is one token if the vocabulary has it, else bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [*TAGS, END_OF_TEXT, PAD]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": END_OF_TEXT, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **named,
    }
    special_map = named | {"additional_special_tokens": list(TAGS)}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens, {len(pieces)} of them words and signs of the task")


def main() -> None:
    from megatron_multiverse.cli import parse_options

    build_tokenizer(parse_options(TokenizerOptions).output)


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
