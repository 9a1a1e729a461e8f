"""Training rows of the miniature, made while the model trains: no row comes twice, and none is kept.

A `RowMaker` draws problems, renders them for a kind of model and lays them out; `MiniLoader` packs them into the
microbatches that `training.trainer.train` asks for. Row i of seed s is the same wherever and whenever it is made, so a
run that was stopped goes on with the rows it would have had.

Label randomisation stands here rather than in files, because files are checked strictly: labels there count from 1. A
model that has only ever read labels from 1 to 4 writes no 5. So half of the rows have an outermost block that counts
from another number, as if it stood inside other blocks; the engine's tolerant reader lays such rows out alike. A model
that has only ever read up to 4 paths writes no fifth either: so half of the calculations have up to 8 short chains.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tasks import LETTERS, REQUESTS, SHORT_STEPS, Problem, Text, sample_arithmetic, sample_satisfiability
from torch.utils.data import DataLoader, Dataset

from megatron_multiverse.data.packing import pack
from megatron_multiverse.data.sft_dataset import Sample, pack_arrays
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.structure import Document, Layout, lay_out, parse
from megatron_multiverse.structure.document import BlockSpan

Kind = Literal["plain", "tagged", "multiverse"]
"""plain: autoregressive on plain text. tagged: autoregressive on the text with tags. multiverse: the same text as
branches."""

MOST_CHAINS = 4
"""Chains of two to four steps in a training problem; the evaluation goes to twice as many."""
MOST_SHORT_CHAINS = 8
"""Chains of one or two steps in a training problem; the evaluation goes to twice as many."""
LARGEST_START = 12
"""Of labels that do not count from 1."""
SAMPLES_AT_ONCE = 8
"""That are drawn and tokenized together."""
MOST_VARIABLES = 4
"""Variables of a training search, and so its deepest block; the evaluation goes beyond."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Which rows a run trains on."""

    kind: Kind
    """What the model is."""
    random_names: bool = True
    """Chains and variables are called by random letters; otherwise A, B, C and so on."""
    random_labels: bool = True
    """Half of the blocks have labels that do not count from 1."""
    short_chains: bool = True
    """Half of the calculations have 2 to 8 chains of one or two steps, the more chains the rarer."""
    train_forced_tokens: bool = False
    """Loss also on what the engine writes itself."""
    official_positions: bool = False
    """Positions as the official training code counts them; the engine serves with ours, as the official one does."""
    seed: int = 0
    """Of all rows."""


def text_of(kind: Kind) -> Text:
    """Which text a kind of model reads and writes."""
    return "plain" if kind == "plain" else "tagged"


class RowMaker:
    """Draws, renders and lays out training rows.

    Args:
        config: which rows.
        tokenizer: of the model.
    """

    def __init__(self, config: RowConfig, tokenizer: MultiverseTokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def problem(self, rng: random.Random) -> Problem:
        """One problem of the training distribution."""
        names = "" if self.config.random_names else LETTERS
        if rng.random() < 0.5:
            if self.config.short_chains and rng.random() < 0.5:
                numbers = range(2, MOST_SHORT_CHAINS + 1)
                (number,) = rng.choices(numbers, [0.7**n for n in numbers])
                return sample_arithmetic(rng, number, SHORT_STEPS, names=names)
            return sample_arithmetic(rng, rng.randint(2, MOST_CHAINS), names=names)
        return sample_satisfiability(rng, rng.randint(3, MOST_VARIABLES), names=names)

    def text(self, rng: random.Random) -> tuple[str, str]:
        """Prompt and response of one row."""
        problem, text = self.problem(rng), text_of(self.config.kind)
        prefix, start = "", 1
        if self.config.random_labels and rng.random() < 0.5:
            start = rng.randint(1, LARGEST_START)
            prefix = "".join(f"{rng.randint(1, 9)}." for _ in range(rng.randint(0, 4)))
        return problem.prompt + REQUESTS[text], problem.response(text, prefix, start)

    def samples(self, rng: random.Random, count: int) -> list[Sample]:
        """Rows as tokens with their layouts. Many texts are tokenized in one call: a call costs as much as a row."""
        texts = [text for _ in range(count) for text in self.text(rng)]
        tokens = self.tokenizer.tokenize_batch(texts)
        return [self._lay_out(prompt, response) for prompt, response in zip(tokens[::2], tokens[1::2], strict=True)]

    def _lay_out(self, prompt: list[int], response: list[int]) -> Sample:
        assert self.tokenizer.eod is not None
        ids = [*prompt, *response, self.tokenizer.eod]
        document = Document(len(ids), len(prompt))
        if self.config.kind == "multiverse":
            document = parse(ids, self.tokenizer.structure_vocab, prompt_length=len(prompt), strict=False)
            broken = set(document.malformed) - {"label_order"}
            assert not broken, f"a row that the engine would not fork ({broken}): {self.tokenizer.detokenize(ids)}"
        layout = lay_out(document)
        if self.config.official_positions:
            layout = with_positions(layout, official_positions(document))
        return Sample(np.asarray(ids, dtype=np.int64), layout)

    def batch(self, index: int, num_rows: int, seq_length: int) -> dict[str, npt.NDArray[Any]]:
        """Microbatch `index`: arrays [num_rows, seq_length], see `pack_arrays`.

        At least as many samples are drawn as would fill the rows without any padding. Packing needs a row or two more
        than that, and the emptiest rows are left out.
        """
        rng = random.Random(f"{self.config.seed}:{index}")
        samples: list[Sample] = []
        missing = num_rows * seq_length
        while missing > 0:
            drawn = [sample for sample in self.samples(rng, SAMPLES_AT_ONCE) if len(sample.ids) <= seq_length]
            samples += drawn
            missing -= sum(len(sample.ids) for sample in drawn)
        lengths = np.array([len(sample.ids) for sample in samples])
        packs = pack(lengths, seq_length, seed=self.config.seed, epoch=index).packs
        packs.sort(key=lambda members: -lengths[members].sum())
        rows = [
            pack_arrays(
                [samples[k] for k in members],
                seq_length,
                self.tokenizer.pad,
                train_forced_tokens=self.config.train_forced_tokens,
            )
            for members in packs[:num_rows]
        ]
        names = ("input_ids", "labels", "loss_mask", "position_ids", "r")
        return {name: np.stack([row[name] for row in rows]) for name in names}


def official_positions(document: Document) -> npt.NDArray[np.int64]:
    """Positions [N] as the official training code counts them (arXiv 2506.09991, code release, `train/utils.py`).

    With g the position of `</Goal>`, each `<Path>` has g + 1, `<Conclusion>` the largest position of any `</Path>` plus
    1, and the newline in a gap counts on from what stands before it in the text. Ours are one further in each path, and
    two after each block.
    """
    positions = np.arange(document.num_tokens)

    def place(start: int, end: int, blocks: list[BlockSpan], shift: int) -> int:
        """Place tokens [start, end), the first at start + shift; returns the position after the last."""
        for block in blocks:
            positions[start : block.goal_end] = np.arange(start, block.goal_end) + shift
            goal_position = block.goal_end - 1 + shift
            gap_position, longest = goal_position + 1, goal_position
            for path in block.paths:
                positions[path.start] = gap_position
                gap_position = place(path.start + 1, path.end, path.blocks, goal_position - path.start)
                longest = max(longest, gap_position - 1)
            positions[block.region_end] = gap_position
            start = block.region_end + 1
            shift = longest + 1 - start
        positions[start:end] = np.arange(start, end) + shift
        return end + shift

    place(0, document.num_tokens, document.blocks, 0)
    return positions


def with_positions(layout: Layout, positions: npt.NDArray[np.int64]) -> Layout:
    """The same layout with other positions [N]; visibility and loss stay as they are."""
    index = np.arange(layout.num_tokens)
    shifts = np.stack([positions - index, layout.r - index], axis=1)
    starts = np.flatnonzero(np.any(np.diff(shifts, axis=0, prepend=shifts[:1] - 1) != 0, axis=1))
    return replace(layout, segments=np.column_stack([starts, shifts[starts]]))


class MiniLoader:
    """The stream of microbatches of a run; see `training.microbatches.Loader`.

    Args:
        maker: of the rows.
        seq_length: tokens of a packed row.
        micro_batch_size: packed rows of a microbatch.
        num_workers: processes that make them ahead of time; 0 makes them in this one.
    """

    tag_ids = None
    """Positions and labels come from here: a scan on the GPU would lay tagged text of every kind out as branches."""

    def __init__(self, maker: RowMaker, *, seq_length: int, micro_batch_size: int, num_workers: int) -> None:
        self._batches = _Batches(maker, seq_length, micro_batch_size)
        self._num_workers = num_workers
        self._next = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        remaining = range(self._next, 1 << 30)
        loader: Any = DataLoader(
            self._batches,
            batch_size=None,
            sampler=remaining,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(0),  # none is drawn from; torch's own would move with every start
        )
        for batch in loader:
            self._next += 1
            yield batch

    def sample_name(self, sample_id: int) -> str:
        """Never asked for, since no row is ever laid out as anything but what it is."""
        return f"row {sample_id}"

    def sample_problem(self, sample_id: int) -> str | None:
        """None: every row is read."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"next": self._next, "rows": repr(self._batches.maker.config)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. Raises CheckpointError if other rows were trained before."""
        if state["rows"] != repr(self._batches.maker.config):
            raise CheckpointError(f"the run was trained on {state['rows']}: go on with the same, or in another folder")
        self._next = state["next"]


class _Batches(Dataset[dict[str, torch.Tensor]]):
    """Microbatch i."""

    def __init__(self, maker: RowMaker, seq_length: int, micro_batch_size: int) -> None:
        self.maker = maker
        self._seq_length = seq_length
        self._size = micro_batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        arrays = self.maker.batch(index, self._size, self._seq_length)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
