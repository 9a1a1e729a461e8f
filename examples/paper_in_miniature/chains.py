"""Chains of calculations side by side: a block with one path for each chain."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from texts import LETTERS, Text, relabel

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))

from task import column_steps

from megatron_multiverse.structure import Block, render

STEPS = (2, 4)
"""Fewest and most steps of a chain."""


@dataclass(frozen=True)
class Chain:
    """A calculation from left to right: a number, then operators with their operands."""

    name: str
    first: int
    steps: tuple[tuple[str, int], ...]
    link: str = ""
    """What follows the name wherever it stands: which chain is next. Empty where the order of the question says it."""

    def __str__(self) -> str:
        """The name with its number right behind it. With `` = `` between them a plain model of this size never learned
        to look numbers up: what it has just written is not what stands before the number then, see README.md."""
        return f"{self.name}{self.link}{self.first}" + "".join(
            f" {operator} {operand}" for operator, operand in self.steps
        )

    @property
    def values(self) -> list[int]:
        """The first number, and the result of every step."""
        values = [self.first]
        for operator, operand in self.steps:
            left = values[-1]
            values.append({"+": left + operand, "-": left - operand, "*": left * operand}[operator])
        return values

    @property
    def result(self) -> str:
        """As it stands in conclusions and answers."""
        return f"{self.name}{self.link}:{self.values[-1]}"

    def work(self, copies_rest: bool = True) -> str:
        """The calculation column by column. Each of its steps begins with a line of what is left of the chain, so that
        all it needs stands in the step before; without `copies_rest` of the step alone, so that the next one must be
        looked up in the question."""
        lines = []
        for index, (left, (operator, operand)) in enumerate(zip(self.values, self.steps, strict=False)):
            rest = self.steps[index:] if copies_rest else self.steps[index : index + 1]
            lines += [str(replace(self, first=left, steps=rest)), *column_steps(operator, left, operand)]
        return "\n".join([*(lines or [str(self)]), self.result])


@dataclass(frozen=True)
class Arithmetic:
    """Independent chains: a block with one path for each.

    The question says where to begin and defines chains in any order, others among them. Each name is two letters, the
    second of which, a small one, says which chain is next: after ``Ky`` comes the one that begins with ``Y``, after
    ``M.`` none. So the next path is found in the same way however many there are, and neither its number nor its place
    in the question tells which it is. A result stands after ``NAME:``, which stands nowhere else.
    """

    chains: tuple[Chain, ...]
    """What is asked for, in this order."""
    definitions: tuple[Chain, ...]
    """These and others, as the question defines them."""
    links: bool = True
    """Otherwise names are single letters, and all that the question defines is asked for, in its order."""
    copies_rest: bool = True
    """See `Chain.work`."""

    @property
    def prompt(self) -> str:
        """The question, without the request to think in one way or the other."""
        if not self.links:
            return f"Work out {'; '.join(map(str, self.chains))}."
        return f"Work out {self.chains[0].name}. {'; '.join(map(str, self.definitions))}."

    @property
    def answer(self) -> str:
        """The right answer."""
        return "; ".join(chain.result for chain in self.chains)

    def response(self, text: Text, prefix: str = "", labels: Sequence[int] = range(1, 100)) -> str:
        """The work and the answer.

        Args:
            text: plain or tagged.
            prefix: what the labels of the outermost block start with.
            labels: its numbers; they do not count from 1 where labels are randomised.
        """
        if text == "plain":
            thought = "\n".join(chain.work(self.copies_rest) for chain in self.chains)
        else:
            names = tuple(chain.name + chain.link for chain in self.chains)
            block = Block(names, tuple((chain.work(self.copies_rest),) for chain in self.chains), self.answer)
            thought = relabel(render([block], prefix=prefix), prefix, labels, len(names))
        return f"<Think>\n{thought}\n</Think>\n\nAnswer: {self.answer}"

    def listed(self, prefix: str, labels: Sequence[int], order: Sequence[int]) -> str:
        """The work and the answer in sequence, with what goals and paths have but without a block: ``LABEL: NAME`` of
        each chain first, then the chains in some other order, each behind its label.

        Args:
            prefix, labels: as in `response`.
            order: of the chains, by their places.
        """
        heads = [f"{prefix}{label}: " for label in labels[: len(self.chains)]]
        names = [f"{head}{chain.name}{chain.link}" for head, chain in zip(heads, self.chains, strict=True)]
        thought = "\n".join([*names, *(heads[place] + self.chains[place].work(self.copies_rest) for place in order)])
        return f"<Think>\n{thought}\n</Think>\n\nAnswer: {self.answer}"

    def is_right(self, answer: str) -> bool:
        """Whether an answer gives every result and nothing else."""
        return answer == self.answer


def sample_chain(rng: random.Random, name: str, num_steps: int) -> Chain:
    """A chain whose results all keep to four digits."""
    chain = Chain(name, rng.randint(10, 999), ())
    while len(chain.steps) < num_steps:
        value, operator = chain.values[-1], rng.choice("+-*")
        operand = rng.randint(2, 9) if operator == "*" else rng.randint(10, 999)
        if operator == "-" and operand > value:
            continue
        longer = Chain(name, chain.first, (*chain.steps, (operator, operand)))
        if longer.values[-1] <= 9999:
            chain = longer
    return chain


def sample_arithmetic(
    rng: random.Random, num_chains: int, steps: tuple[int, int] = STEPS, *, num_spare: int = 0
) -> Arithmetic:
    """Chains of so many steps, from the fewest to the most, and as many more that are defined but not asked for: a list
    of their own."""
    names = rng.sample(LETTERS, num_chains + num_spare)
    links = [name.lower() for name in names[1:]] + ["."]
    links[num_chains - 1] = "."
    defined = [
        replace(sample_chain(rng, name, rng.randint(*steps)), link=link)
        for name, link in zip(names, links, strict=True)
    ]
    chains = tuple(defined[:num_chains])
    rng.shuffle(defined)
    return Arithmetic(chains, tuple(defined))


def without_links(problem: Arithmetic) -> Arithmetic:
    """The same chains, named by single letters and asked for in the order of the question."""
    chains = tuple(replace(chain, link="") for chain in problem.chains)
    return replace(problem, chains=chains, definitions=chains, links=False)
