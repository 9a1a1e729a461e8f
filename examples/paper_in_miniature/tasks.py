"""The two tasks of the miniature: chains of calculations side by side, and satisfiability by case splitting.

Each problem renders itself for a kind of training row: `plain` is the work in sequence, without tags; `tagged` is the
work as parallel blocks. Whether a tagged row is read one token after the other or as branches is the business of
`training_rows.py`. Every answer can be checked without the text that led to it.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))

from task import column_steps

from megatron_multiverse.structure import Block, render

Text = Literal["plain", "tagged"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONG_STEPS, SHORT_STEPS = (2, 4), (1, 2)
"""Fewest and most steps of long and of short chains."""
REQUESTS: dict[Text, str] = {
    "plain": " Think step by step before answering.",
    "tagged": " Think step by step and in parallel before answering.",
}


@dataclass(frozen=True)
class Chain:
    """A calculation from left to right: a number, then operators with their operands."""

    name: str
    first: int
    steps: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return f"{self.name} = {self.first}" + "".join(f" {operator} {operand}" for operator, operand in self.steps)

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
        return f"{self.name} = {self.values[-1]}"

    @property
    def work(self) -> str:
        """The calculation column by column."""
        lines = []
        for left, (operator, operand) in zip(self.values, self.steps, strict=False):
            lines += [f"{self.name} = {left} {operator} {operand}", *column_steps(operator, left, operand)]
        return "\n".join([*lines, self.result])


@dataclass(frozen=True)
class Arithmetic:
    """Independent chains: a block with one path for each."""

    chains: tuple[Chain, ...]

    @property
    def prompt(self) -> str:
        """The question, without the request to think in one way or the other."""
        return f"Work out {'; '.join(map(str, self.chains))}."

    @property
    def answer(self) -> str:
        """The right answer."""
        return "; ".join(chain.result for chain in self.chains)

    def response(self, text: Text, prefix: str = "", start: int = 1) -> str:
        """The work and the answer.

        Args:
            text: plain or tagged.
            prefix: what the labels of the outermost block start with.
            start: the number of its first path; other than 1 only where labels are randomised.
        """
        if text == "plain":
            thought = "\n".join(chain.work for chain in self.chains)
        else:
            names = tuple(chain.name for chain in self.chains)
            block = Block(names, tuple((chain.work,) for chain in self.chains), self.answer)
            thought = shift_labels(render([block], prefix=prefix), prefix, start, len(names))
        return f"<Think>\n{thought}\n</Think>\n\nAnswer: {self.answer}"

    def is_right(self, answer: str) -> bool:
        """Whether an answer gives every result and nothing else."""
        return answer == self.answer


Clause = tuple[tuple[str, bool], ...]
"""Literals: a variable, and whether the clause wants it true."""


@dataclass(frozen=True)
class Satisfiability:
    """Clauses of which each must have a true literal. Splitting on one variable after the other is a tree of blocks."""

    clauses: tuple[Clause, ...]

    @property
    def prompt(self) -> str:
        """The question, without the request to think in one way or the other."""
        return f"Satisfy {spell(self.clauses)}."

    def response(self, text: Text, prefix: str = "", start: int = 1) -> str:
        """The search and the answer; arguments as in `Arithmetic.response`.

        Plain text searches as one would: depth first, and it stops at the first solution.
        """
        model = solve(self.clauses)
        if text == "plain":
            thought = "\n".join(_search_lines(self.clauses, ""))
        else:
            thought = shift_labels(render([_split(self.clauses, "")], prefix=prefix), prefix, start, 2)
        return f"<Think>\n{thought}\n</Think>\n\nAnswer: {'no' if model is None else model}"

    def is_right(self, answer: str) -> bool:
        """Whether an answer satisfies every clause, or rightly says that nothing does."""
        if answer == "no":
            return solve(self.clauses) is None
        pairs = list(zip(answer[::2], answer[1::2], strict=False))
        if len(answer) % 2 or any(name not in LETTERS or value not in "01" for name, value in pairs):
            return False
        clauses = self.clauses
        for name, value in pairs:
            clauses = assign(clauses, name, value == "1")
        return not clauses


Problem = Arithmetic | Satisfiability


def spell(clauses: tuple[Clause, ...]) -> str:
    """Clauses as text, e.g. ``A-BC,-AD``; ``!`` if one of them is empty, so that nothing satisfies them, ``.`` if none
    is left."""
    if () in clauses:
        return "!"
    return ",".join("".join(("" if wanted else "-") + name for name, wanted in clause) for clause in clauses) or "."


def assign(clauses: tuple[Clause, ...], name: str, value: bool) -> tuple[Clause, ...]:
    """What is left of the clauses: true ones go, false literals go."""
    kept = (clause for clause in clauses if (name, value) not in clause)
    return tuple(tuple(literal for literal in clause if literal[0] != name) for clause in kept)


def solve(clauses: tuple[Clause, ...]) -> str | None:
    """The first solution of the search, e.g. ``A0B1`` (variables that do not matter are left out), or None."""
    if not clauses or () in clauses:
        return None if clauses else ""
    name = clauses[0][0][0]
    for value in (False, True):
        found = solve(assign(clauses, name, value))
        if found is not None:
            return f"{name}{int(value)}{found}"
    return None


def _verdict(clauses: tuple[Clause, ...]) -> str:
    model = solve(clauses)
    return "no" if model is None else f"yes {model}".rstrip()


def _split(clauses: tuple[Clause, ...], assigned: str) -> Block:
    """A block with a path for each value of the first variable; both search to the end.

    A path begins with its whole case, as the lines of the plain text do, so that the clauses which it goes on from can
    be found by the case of the path around it.
    """
    name = clauses[0][0][0]
    paths = []
    for value in (False, True):
        case, left = f"{assigned}{name}{int(value)}", assign(clauses, name, value)
        is_leaf = not left or () in left
        paths.append((f"{case}: {spell(left)}", _verdict(left) if is_leaf else _split(left, case)))
    return Block((f"{name}0", f"{name}1"), tuple(paths), _verdict(clauses))


def _search_lines(clauses: tuple[Clause, ...], assigned: str) -> Iterator[str]:
    """Depth-first search up to the first solution; every line names the case that it stands for."""
    name = clauses[0][0][0]
    for value in (False, True):
        case, left = f"{assigned}{name}{int(value)}", assign(clauses, name, value)
        yield f"{case}: {spell(left)}"
        if left and () not in left:
            yield from _search_lines(left, case)
        yield f"{case}: {_verdict(left)}"
        if solve(left) is not None:
            return


def shift_labels(text: str, prefix: str, start: int, count: int) -> str:
    """The labels of the outermost block counted from `start`, and those of the blocks inside it with them."""
    if start == 1:
        return text
    for number in reversed(range(1, count + 1)):  # the last first, so that no label is shifted twice
        for end in (":", "."):
            text = text.replace(f"\n{prefix}{number}{end}", f"\n{prefix}{number + start - 1}{end}")
    return text


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
    rng: random.Random, num_chains: int, steps: tuple[int, int] = LONG_STEPS, *, names: str = ""
) -> Problem:
    """Chains of so many steps, from the fewest to the most; named by random letters unless `names` gives them."""
    names = names or "".join(rng.sample(LETTERS, num_chains))
    return Arithmetic(tuple(sample_chain(rng, name, rng.randint(*steps)) for name in names[:num_chains]))


def sample_satisfiability(rng: random.Random, num_variables: int, *, names: str = "") -> Problem:
    """Four clauses of three literals for each variable; every second problem has no solution."""
    names = names or "".join(rng.sample(LETTERS, num_variables))
    choices = list(itertools.combinations(names[:num_variables], 3))
    is_wanted = rng.random() < 0.5
    while True:
        variables = (rng.sample(rng.choice(choices), 3) for _ in range(4 * num_variables))
        clauses = tuple(tuple((name, rng.random() < 0.5) for name in clause) for clause in variables)
        if (solve(clauses) is not None) == is_wanted:
            return Satisfiability(clauses)


def check(problem: Problem, text: str) -> bool:
    """Whether the last ``Answer:`` line of a text is right."""
    head, found, answer = text.rpartition("Answer: ")
    return bool(found) and (not head or head.endswith("\n")) and problem.is_right(answer.strip())
