"""Satisfiability by case splitting: a tree of blocks, one level for each variable."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from texts import LETTERS, Text, relabel

from megatron_multiverse.structure import Block, render

MARKS = LETTERS.lower()
"""Of clauses."""
Case = tuple[tuple[str, int], ...]
"""Variables and their values; of a clause, the three that it rules out together."""


@dataclass(frozen=True)
class Satisfiability:
    """Clauses of three literals, each written as the one combination of values that it rules out, so that ``D0E1Y0`` is
    the clause D or not E or Y. A search splits on one variable after the other; it is a tree of blocks.

    Clauses stand with the last of their variables: when that one gets its value, it is decided whether they hold, so
    every step of the search tries those of one variable only. Each has a letter of its own. Behind them stands which
    variable is next, so that this is found in the same way at every depth.
    """

    variables: str
    """In the order in which the search splits on them."""
    clauses: tuple[Case, ...]
    """Literals in the order of the variables, clauses in the order of their last variables."""
    first_mark: int = 0
    """Which small letter the first clause has; the others follow in the alphabet, `a` after `z`."""
    given: Case = ()
    """Values of the first variables, which the question says; at most two, so that no clause rules them out. The search
    splits on the others, so its tree has fewer levels than there are variables."""
    back_links: bool = False
    """Behind the name of a variable stands, as a small letter, which one the search splits on before it, or ``.`` if
    none: in the question, and at the end of the conclusion of its block. So what a block is closed into is looked up in
    the same way at every depth: after ``Y0-Y1-Ye`` a value of E, after ``D0+D1-D.`` the end."""

    def marked(self, name: str) -> list[tuple[str, Case]]:
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
            f"{name}{self._back(name)}:"
            + "".join(f" {mark}{spell(clause)}" for mark, clause in self.marked(name))
            + f" {self._next(name)}"
            for name in self.variables
        )
        return f"Set {spell(self.given)}{self.variables[len(self.given)]}, never {'; '.join(groups)}"

    @property
    def answer(self) -> str:
        """The values of the first solution with the given ones, or `no`."""
        return next((spell(case) for case in self.solutions(self.given)), "no")

    def solutions(self, case: Case = ()) -> Iterator[Case]:
        """Every solution that begins with a case, in order."""
        if len(case) == len(self.variables):
            yield case
            return
        for value in (0, 1):
            longer = (*case, (self.variables[len(case)], value))
            if self.is_allowed(longer):
                yield from self.solutions(longer)

    def is_allowed(self, case: Case) -> bool:
        """Whether no clause of the last variable of a case rules it out."""
        return not any(set(clause) <= set(case) for _, clause in self.marked(case[-1][0]))

    def response(self, text: Text, prefix: str = "", labels: Sequence[int] = (1, 2)) -> str:
        """The search and the answer; arguments as in `Arithmetic.response`.

        Plain text searches as one would: depth first, and it stops at the first solution.
        """
        if text == "plain":
            thought = "\n".join(self._search(self.given))
        else:
            thought = relabel(render([self._split(self.given)], prefix=prefix), prefix, labels, 2)
        return f"<Think>\n{thought}\n</Think>\n\nAnswer: {self.answer}"

    def is_right(self, answer: str) -> bool:
        """Whether an answer is a solution, or rightly says that there is none."""
        solutions = {spell(case) for case in self.solutions(self.given)}
        return answer in solutions or (answer == "no" and not solutions)

    def _next(self, name: str) -> str:
        """Which variable comes after this one; ``>.`` after the last."""
        return ">" + (self.variables + ".")[self.variables.index(name) + 1]

    def _back(self, name: str) -> str:
        """Which variable the search splits on before this one; ``.`` before the first of them and those given."""
        if not self.back_links:
            return ""
        place = self.variables.index(name)
        return self.variables[place - 1].lower() if place > len(self.given) else "."

    def _trial(self, case: Case) -> str:
        """A case and the clauses tried on it, up to the first that rules it out. Each is compared literal by literal:
        `+` after the first one that the case does not have, `-` if it has them all. After clauses that all hold stands
        which variable is next."""
        tried = ""
        for mark, clause in self.marked(case[-1][0]):
            other = next((index for index, literal in enumerate(clause) if literal not in case), None)
            tried += mark + spell(clause if other is None else clause[: other + 1]) + ("-" if other is None else "+")
            if other is None:
                return f"{spell(case)}: {tried}"
        return f"{spell(case)}: {tried}{self._next(case[-1][0])}"

    def _verdict(self, case: Case) -> str:
        """The last value of a case, `+` if there is a solution with the whole case and `-` otherwise."""
        has_solution = self.is_allowed(case) and any(True for _ in self.solutions(case))
        return spell(case[-1:]) + "-+"[has_solution]

    def _is_leaf(self, case: Case) -> bool:
        return len(case) == len(self.variables) or not self.is_allowed(case)

    def _cases(self, case: Case) -> tuple[Case, Case]:
        name = self.variables[len(case)]
        return (*case, (name, 0)), (*case, (name, 1))

    def _split(self, case: Case) -> Block:
        """A block with a path for each value of the next variable; both search to the end."""
        cases = self._cases(case)
        paths = tuple(
            (f"{self._trial(one)}\n{self._verdict(one)}",)
            if self._is_leaf(one)
            else (self._trial(one), self._split(one), self._verdict(one))
            for one in cases
        )
        name = self.variables[len(case)]
        back = f"{name}{self._back(name)}" if self.back_links else ""
        return Block(tuple(map(spell, cases)), paths, "".join(map(self._verdict, cases)) + back)

    def _search(self, case: Case) -> Iterator[str]:
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


def spell(case: Case) -> str:
    """Variables with their values, e.g. ``D0E1``."""
    return "".join(f"{name}{value}" for name, value in case)


def sample_satisfiability(rng: random.Random, num_variables: int, num_given: int = 0) -> Satisfiability:
    """Clauses that rule out all but one combination of values, or, in every second problem, all of them.

    Each clause rules out a combination that those before it leave, so that none is in vain when it is added. Where
    values are given, they are those of the solution, if there is one.
    """
    names = "".join(rng.sample(LETTERS, num_variables))
    num_solutions = rng.randrange(2)
    clauses = _ruling_out(rng, names, num_solutions)
    while len(clauses) > len(MARKS):
        clauses = _ruling_out(rng, names, num_solutions)
    clauses.sort(key=lambda clause: names.index(clause[-1][0]))
    problem = Satisfiability(names, tuple(clauses), rng.randrange(len(MARKS)))
    if not num_given:
        return problem
    case = next(problem.solutions(), tuple((name, rng.randrange(2)) for name in names))
    return replace(problem, given=case[:num_given])


def _ruling_out(rng: random.Random, names: str, num_solutions: int) -> list[Case]:
    left = set(itertools.product((0, 1), repeat=len(names)))
    clauses: list[Case] = []
    while len(left) > num_solutions:
        places = sorted(rng.sample(range(len(names)), 3))
        values = [rng.randrange(2) for _ in places]
        ruled_out = {one for one in left if [one[place] for place in places] == values}
        if ruled_out and len(left) - len(ruled_out) >= num_solutions:
            left -= ruled_out
            clauses.append(tuple((names[place], value) for place, value in zip(places, values, strict=True)))
    return clauses
