"""Training rows of the miniature, made while the model trains: no row comes twice, and none is kept.

A `RowMaker` draws problems, renders them for a kind of model and lays them out; `MiniLoader` packs them into the
microbatches that `training.trainer.train` asks for. Row i of seed s is the same wherever and whenever it is made, so a
run that was stopped goes on with the rows it would have had.

What lets a model go beyond the number of paths that it was trained on stands here too, each under a name of
`RowConfig`: a model that has only ever read labels from 1 to 4 writes no 5, and one that has only ever looked so far
back does not look further. Labels that start anywhere cannot come from files, which are checked strictly; the engine's
tolerant reader lays such rows out alike.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from chains import STEPS, Arithmetic, without_links
from official_mask import both_labels, leaky
from positions import gapped, official_positions, with_positions
from tasks import REQUESTS, Problem, Satisfiability, sample_arithmetic, sample_satisfiability
from texts import Text
from torch.utils.data import DataLoader, Dataset

from megatron_multiverse.data.mixture import PAPER_SHARES
from megatron_multiverse.data.packing import pack
from megatron_multiverse.data.sft_dataset import Sample, pack_arrays
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.structure import Document, Layout, Tag, lay_out, parse

Kind = Literal["plain", "tagged", "multiverse"]
"""plain: autoregressive on plain text. tagged: autoregressive on the text with tags. multiverse: the same text as
branches."""

MOST_CHAINS = 4
"""Chains of a training problem, and so its paths; the evaluation goes beyond."""
MOST_DEFINITIONS = 12
"""Chains that the question of a training problem defines, most of which are not asked for."""
FEWEST_VARIABLES = 3
"""Of a search: as many as a clause has literals."""
MOST_VARIABLES = 4
"""Variables of a training search, and so its deepest block; the evaluation goes beyond."""
MOST_GIVEN = 2
"""Variables of a training search whose values the question says, see `given_values`."""
MOST_LISTED = 12
"""Names of a row that only looks numbers up, without a block."""
SHARE_OF_LISTS = 0.4
"""Of the rows; about an eighth of the tokens once the other problems are long."""
FEW_STEPS, SHARE_OF_FEW_STEPS = (0, 1), 0.25
"""Fewest and most steps of chains that are little more than looking up; their share of the calculations."""
LARGEST_START = 12
"""Of labels that do not count from 1."""
LARGEST_STEP = 4
"""From one label to the next where numbers are left out."""
SAMPLES_AT_ONCE = 8
"""That are drawn and tokenized together."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Which rows a run trains on."""

    kind: Kind
    """What the model is."""
    links: bool = True
    """Names of chains say which chain is next, so that neither place nor number does."""
    copies_rest: bool = True
    """Each step of a chain begins with what is left of it."""
    spare_definitions: bool = True
    """Questions define other chains as well, up to as many as the evaluation asks for."""
    long_lists: bool = True
    """Some rows ask for as many names as the evaluation does, of chains without any step, and have no block: numbers
    are looked up one after the other."""
    labelled_lists: bool = True
    """Of rows with tags: the names of such a list stand first, behind labels, and each number behind the label of its
    name, in another order: so more labels are written and looked up than a block has paths. Plain rows have none."""
    random_labels: bool = True
    """Most blocks have labels that do not count from 1."""
    label_gaps: bool = True
    """Numbers are left out between the labels of half of these blocks, so that the distance of two labels does not tell
    how many paths lie between them."""
    position_gaps: bool = True
    """Positions are left out in half of the rows."""
    given_values: bool = False
    """Two thirds of the searches have up to two variables more, whose values the question says: so questions and cases
    are as long as in the evaluation, but no tree of blocks has more levels."""
    back_links: bool = False
    """Variables of searches say which one is split on before them, so that what a block is closed into is looked up,
    not told by how many blocks were closed within it."""
    low_trees: bool = False
    """With `given_values`: searches have trees from one level upward, as many of each height, so that every height but
    the greatest ends some trees and not others."""
    search_share: float = 0.35
    """Of the problems, after the first batches."""
    first_batches: int = 300
    """Batches of chains without any step, so that all there is to learn is to look up names and numbers: what longer
    problems need too is learned so in a small part of the time. Over as many batches again such rows become fewer."""
    train_forced_tokens: bool = False
    """Loss also on what the engine writes itself."""
    official_positions: bool = False
    """Positions as the official training code counts them; the engine serves with ours, as the official one does."""
    official_mask: bool = False
    """The mask of the official training code, in which the newline between two paths sees the earlier one and is seen
    by the later one; the engine serves without that leak, as the official one does."""
    mixture_batches: int = 0
    """Batches over which the share of rows with tags grows as the paper's over its eight epochs; the others are plain
    text. 0 gives all rows tags from the start."""
    seed: int = 0
    """Of all rows."""

    def __post_init__(self) -> None:
        assert self.given_values or not self.low_trees, "a tree of one level needs two values that are given"


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

    def share_of_first_rows(self, index: int) -> float:
        """Of the rows of batch `index`: all up to `first_batches`, then fewer from batch to batch, and none from twice
        as many on. What was learned is needed all the way over to the longer problems."""
        first = self.config.first_batches
        return min(1.0, max(0.0, 2 - index / first)) if first else 0.0

    def share_of_tagged_rows(self, index: int) -> float:
        """Of the rows of batch `index` of a kind with tags."""
        batches = self.config.mixture_batches
        return PAPER_SHARES[min(len(PAPER_SHARES) * index // batches, len(PAPER_SHARES) - 1)] if batches else 1.0

    def problem(self, rng: random.Random, index: int) -> tuple[Problem, bool]:
        """One problem of batch `index`, and whether it is a list, which has no block in any text."""
        links = self.config.links
        is_first = rng.random() < self.share_of_first_rows(index)
        if links and self.config.long_lists and rng.random() < SHARE_OF_LISTS:
            number = rng.randint(2, MOST_LISTED)
            return sample_arithmetic(rng, number, (0, 0), num_spare=rng.randint(0, MOST_LISTED - number)), True
        if not is_first and rng.random() < self.config.search_share:
            return self._search(rng), False
        number = rng.choices(range(2, MOST_CHAINS + 1), (4, 3, 2))[0]
        steps = (0, 0) if is_first else FEW_STEPS if rng.random() < SHARE_OF_FEW_STEPS else STEPS
        has_spare = links and self.config.spare_definitions
        num_spare = rng.randint(0, MOST_DEFINITIONS - number) if has_spare else 0
        problem = sample_arithmetic(rng, number, steps, num_spare=num_spare)
        problem = replace(problem, copies_rest=self.config.copies_rest)
        return problem if links else without_links(problem), False

    def _search(self, rng: random.Random) -> Satisfiability:
        num_split = rng.randint(1 if self.config.low_trees else FEWEST_VARIABLES, MOST_VARIABLES)
        fewest_given = max(0, FEWEST_VARIABLES - num_split)
        num_given = rng.randint(fewest_given, MOST_GIVEN if self.config.given_values else 0)
        search = sample_satisfiability(rng, num_split + num_given, num_given)
        return replace(search, back_links=self.config.back_links)

    def text(self, rng: random.Random, index: int) -> tuple[str, str]:
        """Prompt and response of one row of batch `index`."""
        text: Text = text_of(self.config.kind)
        if self.config.mixture_batches and rng.random() >= self.share_of_tagged_rows(index):
            text = "plain"
        problem, is_list = self.problem(rng, index)
        prompt = problem.prompt + REQUESTS["plain" if is_list else text]
        if is_list and text == "tagged" and self.config.labelled_lists:
            assert isinstance(problem, Arithmetic), "only calculations are lists"
            prefix, labels = self._labels(rng, MOST_LISTED)
            return prompt, problem.listed(prefix, labels, rng.sample(range(len(problem.chains)), len(problem.chains)))
        prefix, labels = self._labels(rng, MOST_CHAINS)
        return prompt, problem.response("plain" if is_list else text, prefix, labels)

    def _labels(self, rng: random.Random, count: int) -> tuple[str, list[int]]:
        """What the labels of the outermost block begin with, and their numbers [count]."""
        if not self.config.random_labels or rng.random() >= 0.9:
            return "", list(range(1, count + 1))
        start = rng.randint(1, LARGEST_START)
        labels = list(range(start, start + count))
        if self.config.label_gaps and rng.random() < 0.5:
            labels = list(itertools.accumulate((rng.randint(1, LARGEST_STEP) for _ in range(count - 1)), initial=start))
        return "".join(f"{rng.randint(1, 9)}." for _ in range(rng.choice((0, 0, 1, 2, 3, 4)))), labels

    def samples(self, rng: random.Random, index: int, count: int) -> list[Sample]:
        """Rows as tokens with their layouts. Many texts are tokenized in one call: a call costs as much as a row."""
        texts = [text for _ in range(count) for text in self.text(rng, index)]
        tokens = self.tokenizer.tokenize_batch(texts)
        return [
            self._lay_out(prompt, response, rng) for prompt, response in zip(tokens[::2], tokens[1::2], strict=True)
        ]

    def _lay_out(self, prompt: list[int], response: list[int], rng: random.Random) -> Sample:
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
        if self.config.position_gaps and rng.random() < 0.5:
            layout = with_positions(
                layout, gapped(layout.position_ids.astype(np.int64), self._seams(ids, len(prompt), layout), rng)
            )
        array = np.asarray(ids, dtype=np.int64)
        return leaky(array, document, layout) if self.config.official_mask else Sample(array, layout)

    def _seams(self, ids: list[int], prompt_length: int, layout: Layout) -> list[int]:
        """Positions [at most 4] at which the parts of a row begin: the response; the paths and the conclusion of the
        outermost block, whose goal ends first and whose conclusion is the last; the answer."""
        tags = self.tokenizer.structure_vocab.tag_ids
        last = len(ids) - 1
        found = [ids.index(tags[Tag.END_GOAL])] if tags[Tag.END_GOAL] in ids else []
        for end in (tags[Tag.CONCLUSION], tags[Tag.END_THINK]):
            found += [last - ids[::-1].index(end)] if end in ids else []
        return [prompt_length, *(int(layout.position_ids[place]) + 1 for place in found)]

    def batch(self, index: int, num_rows: int, seq_length: int) -> dict[str, npt.NDArray[Any]]:
        """Microbatch `index`: arrays [num_rows, seq_length], see `pack_arrays`.

        At least as many samples are drawn as would fill the rows without any padding. Packing needs a row or two more
        than that, and the emptiest rows are left out.
        """
        rng = random.Random(f"{self.config.seed}:{index}")
        samples: list[Sample] = []
        missing = num_rows * seq_length
        while missing > 0:
            drawn = [sample for sample in self.samples(rng, index, SAMPLES_AT_ONCE) if len(sample.ids) <= seq_length]
            samples += drawn
            missing -= sum(len(sample.ids) for sample in drawn)
        lengths = np.array([len(sample.ids) for sample in samples])
        packs = pack(lengths, seq_length, seed=self.config.seed, epoch=index).packs
        packs.sort(key=lambda members: -lengths[members].sum())
        rows = [self._packed([samples[k] for k in members], seq_length) for members in packs[:num_rows]]
        names = ("input_ids", "labels", "loss_mask", "position_ids", "r")
        return {name: np.stack([row[name] for row in rows]) for name in names}

    def _packed(self, samples: list[Sample], seq_length: int) -> dict[str, npt.NDArray[Any]]:
        """Samples as one row, see `pack_arrays`; under the official mask ``r`` holds both labels of each token."""
        row = pack_arrays(samples, seq_length, self.tokenizer.pad, train_forced_tokens=self.config.train_forced_tokens)
        return row | {"r": both_labels(row["r"], samples)} if self.config.official_mask else row


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
