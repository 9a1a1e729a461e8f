"""The prompts of a run, each with its right answer: rows of files, in another order every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_multiverse.config import TaskConfig
from megatron_multiverse.data.chat_templates import DEFAULT_DATE, parse_date
from megatron_multiverse.data.prompts import SUFFIXES
from megatron_multiverse.data.readers import read_rows
from megatron_multiverse.data.sources import open_source
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import CheckpointError, ConfigError, DataError
from megatron_multiverse.grading import gold_answer


@dataclass(frozen=True)
class Prompt:
    """One row of a task."""

    text: str
    """As the model reads it."""
    ids: list[int]
    gold: str
    """The right answer."""
    row: Mapping[str, Any]
    """All columns, for reward functions of one's own."""
    family: str = ""
    """What `task.family_key` says of it."""


class Prompts:
    """Hands out prompts, and knows where it stands; see `training.microbatches.Documents` and `Position`.

    Args:
        config: where they come from.
        tokenizer: of the model.
        seed: of the order.

    Raises:
        DataError: there is no row, or one without a prompt or an answer; the message names it.
    """

    tag_ids = None  # the layout of rollouts is made on the host; what a trainer scans is documents of data sets

    def __init__(self, config: TaskConfig, tokenizer: MultiverseTokenizer, seed: int) -> None:
        self._seed = seed
        self._prompts = read_prompts(config, tokenizer)
        self.drawn = 0
        """Prompts handed out."""
        digest = hashlib.sha256(repr([(prompt.ids, prompt.gold) for prompt in self._prompts]).encode())
        self._fingerprint = digest.hexdigest()[:16]
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.longest_ids)

    @property
    def longest_ids(self) -> list[int]:
        """Its ids."""
        return max((prompt.ids for prompt in self._prompts), key=len)

    def draw(self) -> tuple[int, Prompt]:
        """The next prompt, and its number in the run, from 0."""
        number, (epoch, place) = self.drawn, divmod(self.drawn, len(self._prompts))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._order = epoch, rng.permutation(len(self._prompts)).tolist()
        self.drawn += 1
        return number, self._prompts[self._order[1][place]]

    def sample_name(self, sample_id: int) -> str:
        """See `Documents`; answers have no number there."""
        return "an answer of this run"

    def sample_problem(self, sample_id: int) -> str | None:
        """See `Documents`."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See `Position`."""
        return {"drawn": self.drawn, "seed": self._seed, "prompts": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Position`.

        Raises:
            CheckpointError: the checkpoint is of a run with other prompts, or with another seed.
        """
        for name in ("seed", "prompts"):
            if state.get(name) != self.state_dict()[name]:
                raise CheckpointError(
                    f"the checkpoint is of a run with other prompts ({name} {state.get(name)!r} there, "
                    f"{self.state_dict()[name]!r} here): give the same task and seed. To go on from its weights "
                    "with others, start a new run: another checkpoint.save, and this run's folder as init_from"
                )
        self.drawn = state["drawn"]


def read_prompts(config: TaskConfig, tokenizer: MultiverseTokenizer) -> list[Prompt]:
    """All rows of a task, tokenized.

    Raises:
        ConfigError: they are to be wrapped in a chat template, and the tokenizer has none.
        DataError: see `Prompts`.
    """
    rows: list[Mapping[str, Any]] = []
    for shard in open_source(config.input, split=config.split).shards:
        for row in read_rows(shard):
            if row.is_blank:
                continue
            for key in filter(None, (config.prompt_key, config.answer_key, config.family_key)):
                if not _text(row.fields.get(key)):
                    why = row.error or f"no text in column {key!r} (it has {', '.join(row.fields) or 'none'})"
                    raise DataError(
                        f"{config.input}, row {row.row}: {why}; name the columns with task.prompt_key, "
                        "task.answer_key and task.family_key (--task.family_key= divides into no families), or remove "
                        "the row"
                    )
            rows.append(row.fields)
    if not rows:
        raise DataError(f"{config.input} holds no rows; give rows with {config.prompt_key} and {config.answer_key}")
    texts = [_text(row[config.prompt_key]) + SUFFIXES[config.prompt_suffix] for row in rows]
    if config.chat and tokenizer.chat_template is None:
        raise ConfigError(
            "task.chat is true, but the tokenizer has no default chat template: set it false, or name a tokenizer that "
            "has one in task.tokenizer_model"
        )
    if config.chat:
        texts = [tokenizer.render_chat(text, date=parse_date(DEFAULT_DATE)) for text in texts]
    ids = tokenizer.tokenize_batch(texts)
    golds = [gold_answer(_text(row[config.answer_key])) for row in rows]
    families = [_text(row[config.family_key]) if config.family_key else "" for row in rows]
    return [Prompt(*parts) for parts in zip(texts, ids, golds, rows, families, strict=True)]


def _text(value: Any) -> str:
    """A cell as text: some data sets have numbers for answers. Empty where there is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps comes as floats, and no model answers 5.0
    return str(value) if is_number else value if isinstance(value, str) and value.strip() else ""
