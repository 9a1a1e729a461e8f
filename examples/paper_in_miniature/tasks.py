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
MARKS = LETTERS.lower()
"""Of clauses."""
STEPS = (2, 4)
"""Fewest and most steps of a chain."""
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
        return f"{self.name}: {self.values[-1]}"

    @property
    def work(self) -> str:
        """The calculation column by column."""
        lines = []
        for left, (operator, operand) in zip(self.values, self.steps, strict=False):
            lines += [f"{self.name} = {left} {operator} {operand}", *column_steps(operator, left, operand)]
        return "\n".join([*lines, self.result])


@dataclass(frozen=True)
class Arithmetic:
    """Independent chains: a block with one path for each.

    The question names the chains that are asked for, one letter after the other, and then defines them, in any order
    and with others among them. So the next path is always found in the same way, however many there are: its name is the
    letter after the name before. A result stands after ``NAME:``, which stands nowhere else.
    """

    chains: tuple[Chain, ...]
    """What is asked for, in this order."""
    definitions: tuple[Chain, ...]
    """These and others, as the question defines them."""
    has_list: bool = True
    """Otherwise the question has no list of names, and all that it defines is asked for."""

    @property
    def prompt(self) -> str:
        """The question, without the request to think in one way or the other."""
        if not self.has_list:
            return f"Work out {'; '.join(map(str, self.chains))}."
        names = "".join(chain.name for chain in self.chains)
        return f"Work out {names}. {'; '.join(map(str, self.definitions))}."

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


Literal3 = tuple[tuple[str, int], ...]
"""A variable and a value, for each of the three literals of a clause."""


@dataclass(frozen=True)
class Satisfiability:
    """Clauses of three literals, each written as the one combination of values that it rules out, so that ``D0E1Y0`` is
    the clause D or not E or Y. A search splits on one variable after the other; it is a tree of blocks.

    Clauses stand with the last of their variables: when that one gets its value, it is decided whether they hold, so
    every step of the search tries those of one variable only. Each has a letter of its own.
    """

    variables: str
    """In the order in which the search splits on them."""
    clauses: tuple[Literal3, ...]
    """Literals in the order of the variables, clauses in the order of their last variables."""
    first_mark: int = 0
    """Which small letter the first clause has; the others follow in the alphabet, `a` after `z`."""

    def marked(self, name: str) -> list[tuple[str, Literal3]]:
        """The clauses whose last variable this is, with their letters."""
        return [
            (MARKS[(self.first_mark + index) % len(MARKS)], clause)
            for index, clause in enumerate(self.clauses)
            if clause[-1][0] == name
        ]

    @property
    def prompt(self) -> str:
        """The question, without the request to think in one way or the other."""
        groups = (
            f"{name}:" + "".join(f" {mark}{spell(clause)}" for mark, clause in self.marked(name))
            for name in self.variables
        )
        return f"Set {self.variables}, never {'; '.join(groups)}."

    @property
    def answer(self) -> str:
        """The values of the first solution, or `no`."""
        return next((spell(case) for case in self.solutions()), "no")

    def solutions(self, case: Literal3 = ()) -> Iterator[Literal3]:
        """Every solution that begins with a case, in order."""
        if len(case) == len(self.variables):
            yield case
            return
        for value in (0, 1):
            longer = (*case, (self.variables[len(case)], value))
            if self.is_allowed(longer):
                yield from self.solutions(longer)

    def is_allowed(self, case: Literal3) -> bool:
        """Whether no clause of the last variable of a case rules it out."""
        return not any(set(clause) <= set(case) for _, clause in self.marked(case[-1][0]))

    def response(self, text: Text, prefix: str = "", start: int = 1) -> str:
        """The search and the answer; arguments as in `Arithmetic.response`.

        Plain text searches as one would: depth first, and it stops at the first solution.
        """
        if text == "plain":
            thought = "\n".join(self._search(()))
        else:
            thought = shift_labels(render([self._split(())], prefix=prefix), prefix, start, 2)
        return f"<Think>\n{thought}\n</Think>\n\nAnswer: {self.answer}"

    def is_right(self, answer: str) -> bool:
        """Whether an answer gives every variable a value that no clause rules out, or rightly says that there is none."""
        solutions = {spell(case) for case in self.solutions()}
        return answer in solutions or (answer == "no" and not solutions)

    def _trial(self, case: Literal3) -> str:
        """A case and the clauses tried on it, `+` after those that hold, up to the first that does not."""
        tried = ""
        for mark, clause in self.marked(case[-1][0]):
            is_broken = set(clause) <= set(case)
            tried += mark + "+-"[is_broken]
            if is_broken:
                break
        return f"{spell(case)}: {tried}".rstrip()

    def _verdict(self, case: Literal3) -> str:
        """The last value of a case, `+` if there is a solution with the whole case and `-` otherwise."""
        has_solution = self.is_allowed(case) and any(True for _ in self.solutions(case))
        return spell(case[-1:]) + "-+"[has_solution]

    def _is_leaf(self, case: Literal3) -> bool:
        return len(case) == len(self.variables) or not self.is_allowed(case)

    def _cases(self, case: Literal3) -> tuple[Literal3, Literal3]:
        name = self.variables[len(case)]
        return (*case, (name, 0)), (*case, (name, 1))

    def _split(self, case: Literal3) -> Block:
        """A block with a path for each value of the next variable; both search to the end."""
        cases = self._cases(case)
        paths = tuple(
            (f"{self._trial(one)}\n{self._verdict(one)}",)
            if self._is_leaf(one)
            else (self._trial(one), self._split(one), self._verdict(one))
            for one in cases
        )
        return Block(tuple(map(spell, cases)), paths, "".join(map(self._verdict, cases)))

    def _search(self, case: Literal3) -> Iterator[str]:
        """Depth-first search up to the first solution; every case ends with its verdict, except those around the
        solution."""
        for one in self._cases(case):
            yield self._trial(one)
            if not self._is_leaf(one):
                yield from self._search(one)
            verdict = self._verdict(one)
            if verdict.endswith("-") or len(one) == len(self.variables):
                yield verdict
            if verdict.endswith("+"):
                return


Problem = Arithmetic | Satisfiability


def spell(case: Literal3) -> str:
    """Variables with their values, e.g. ``D0E1``."""
    return "".join(f"{name}{value}" for name, value in case)


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
    rng: random.Random, num_chains: int, steps: tuple[int, int] = STEPS, *, num_spare: int = 0, has_list: bool = True
) -> Arithmetic:
    """Chains of so many steps, from the fewest to the most, and as many more that are defined but not asked for."""
    names = rng.sample(LETTERS, num_chains + num_spare)
    defined = [sample_chain(rng, name, rng.randint(*steps)) for name in names]
    chains = tuple(defined[:num_chains])
    rng.shuffle(defined)
    return Arithmetic(chains, tuple(defined), has_list)


def sample_satisfiability(rng: random.Random, num_variables: int) -> Satisfiability:
    """Clauses that rule out all but one combination of values, or, in every second problem, all of them.

    Each clause is drawn until it rules out a combination that is left, so that none is there in vain when it is added.
    """
    names = "".join(rng.sample(LETTERS, num_variables))
    left = set(itertools.product((0, 1), repeat=num_variables))
    num_solutions = rng.randrange(2)
    clauses: list[Literal3] = []
    while len(left) > num_solutions:
        places = sorted(rng.sample(range(num_variables), 3))
        values = [rng.randrange(2) for _ in places]
        ruled_out = {one for one in left if [one[place] for place in places] == values}
        if ruled_out and len(left) - len(ruled_out) >= num_solutions:
            left -= ruled_out
            clauses.append(tuple((names[place], value) for place, value in zip(places, values, strict=True)))
    clauses.sort(key=lambda clause: names.index(clause[-1][0]))
    return Satisfiability(names, tuple(clauses), rng.randrange(len(MARKS)))


def check(problem: Problem, text: str) -> bool:
    """Whether the last ``Answer:`` line of a text is right."""
    head, found, answer = text.rpartition("Answer: ")
    return bool(found) and (not head or head.endswith("\n")) and problem.is_right(answer.strip())
